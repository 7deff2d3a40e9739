"""The one question that every other objective asks again and again: the least step, or one below a limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Certificate, Plan
from stagewright.planner.plan_summary import alternative_of
from stagewright.planner.search.declared_space import DeclaredSpace
from stagewright.planner.search.exact import solve
from stagewright.planner.search.limits import OPTIMAL_GAP, Limits, Termination
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import divisors
from stagewright.planner.search.work_count import WorkCount

ANY_GAP = 1e6
MOST_NODES_ONE_BY_ONE = 32


@dataclass
class Tally:
    """The work of several searches, summed."""

    candidates: int = 0
    evaluated: int = 0
    simulated: int = 0
    searches: int = 0

    def add(self, outcome: PlanOutcome) -> PlanOutcome:
        """Count an outcome's work; return it."""
        self.candidates += outcome.candidates
        self.evaluated += outcome.evaluated
        self.simulated += outcome.simulated
        self.searches += 1
        return outcome


def least_step(problem: Problem, limits: Limits, tally: Tally, *, gap: float | None = None) -> PlanOutcome:
    """Return the plan of least step, without alternatives; progress is the caller's to report."""
    return tally.add(solve(problem, replace(limits, top=0, gap=limits.gap if gap is None else gap, progress=None)))


def step_at_most(problem: Problem, limits: Limits, tally: Tally, most_s: float) -> PlanOutcome:
    """Return a plan that is at most `most_s` long, within the gap of the fastest; else the fastest, and a bound above `most_s`.

    A second search proves exactly the gap that is left between its plan and `most_s`, where the first left it open.
    """
    outcome = least_step(problem, limits, tally)
    if outcome.objective_s is None or outcome.objective_s <= most_s or proved_above(outcome, most_s):
        return outcome
    return least_step(problem, limits, tally, gap=max(0.0, outcome.objective_s / (most_s * (1 + 1e-9)) - 1.0))


def proved_above(outcome: PlanOutcome, most_s: float) -> bool:
    """Tell whether an outcome proves that no plan takes at most `most_s`."""
    return outcome.status == "infeasible" or (outcome.bound_s is not None and outcome.bound_s > most_s)


def fitting(problem: Problem, limits: Limits, tally: Tally) -> PlanOutcome:
    """Return some plan that fits, or the proof that none does."""
    return least_step(problem, limits, tally, gap=ANY_GAP)


def step_bound(problem: Problem, limits: Limits) -> float:
    """Return a lower bound of every plan's step before anything is solved; infinite when nothing can fit."""
    space = DeclaredSpace(problem, limits, WorkCount())
    return float(space.bound_s.min()) if space.num_candidates else float("inf")


def device_choices(problem: Problem) -> list[int]:
    """Return the numbers of devices an objective chooses among, ascending.

    Every number up to 16 devices or the problem's own; beyond, divisors of a node, and whole nodes: each number of them
    up to 32, else those that divide all nodes.
    """
    if problem.only_counts is not None or problem.num_devices <= 16:
        return sorted(problem.device_counts)
    total, per_node = problem.num_devices, problem.cluster.groups[0].devices_per_node
    nodes = total // per_node
    whole = range(1, nodes + 1) if nodes <= MOST_NODES_ONE_BY_ONE else divisors(nodes)
    return sorted({*divisors(per_node), *(count * per_node for count in whole), total})


def status_of(gap: float, limits: Limits, stopped: Termination | None) -> str:
    """Return the status of a proved gap."""
    if gap <= OPTIMAL_GAP:
        return "optimal"
    return "within_gap" if gap <= limits.gap + 1e-9 and stopped is None else "feasible"


def answered(
    problem: Problem,
    limits: Limits,
    tally: Tally,
    plan: Plan,
    *,
    name: str,
    objective: float,
    bound: float,
    gap: float,
    stopped: Termination | None,
    counts: Iterable[int],
    words: str,
    alternatives: Iterable[Plan] = (),
) -> PlanOutcome:
    """Return the outcome of an objective, its certificate in the plan; `words` say what was proved and how."""
    status = status_of(gap, limits, stopped)
    space = problem.space_words() | {"devices": sorted(counts), "objective": words, "searches": tally.searches}
    certificate = Certificate.model_validate(
        {
            "status": status,
            "objective_name": name,
            "space": space,
            "objective": objective,
            "bound": bound,
            "gap": gap,
            "candidates": tally.candidates,
            "evaluated": tally.evaluated,
            "simulated": tally.simulated,
        }
    )
    return PlanOutcome.model_validate(
        {
            "status": status,
            "plan": plan.model_copy(update={"certificate": certificate}),
            "objective_s": plan.prediction.step_time_s,
            "bound_s": None,
            "gap": gap,
            "objective_name": name,
            "objective": objective,
            "bound": bound,
            "candidates": tally.candidates,
            "evaluated": tally.evaluated,
            "simulated": tally.simulated,
            "wall_s": 0.0,
            "termination": stopped or ("optimal" if status == "optimal" else "gap"),
            "alternatives": tuple(alternative_of(other) for other in alternatives)[: limits.top],
        }
    )


def unanswered(tally: Tally, outcome: PlanOutcome, name: str) -> PlanOutcome:
    """Return an outcome without a plan (infeasible, or stopped) with the work of all searches."""
    return outcome.model_copy(
        update={
            "plan": None,
            "objective_s": None,
            "bound_s": None,
            "gap": None,
            "objective_name": name,
            "candidates": tally.candidates,
            "evaluated": tally.evaluated,
            "simulated": tally.simulated,
            "alternatives": (),
        }
    )
