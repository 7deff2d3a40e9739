"""The fewest devices on which the job trains, within the step deadline where there is one.

Device counts are tried in ascending order. A count is closed when the bound of its whole space is above the deadline
(before anything is solved), or when the search proves it; the first count with a plan is the answer, and of its plans
the fastest is returned. What stays open below it (a limit came first) is the bound. Steps are not assumed to shrink
with the number of devices: divisibility makes some counts worse than smaller ones.
"""

from __future__ import annotations

from stagewright.planner.documents.outcome import Diagnosis, PlanOutcome
from stagewright.planner.objectives.least_step import (
    Tally,
    answered,
    device_choices,
    least_step,
    proved_above,
    step_at_most,
    step_bound,
    unanswered,
)
from stagewright.planner.objectives.step_time import below_deadline
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.problem import Problem


def solve_fewest_devices(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the fastest plan on the fewest devices whose step is at most the job's deadline."""
    most_s = problem.job.step_deadline_s or float("inf")
    tally, counts = Tally(), device_choices(problem)
    bound: int | None = None
    stopped: Termination | None = None
    last: PlanOutcome | None = None
    for place, count in enumerate(counts):
        limits.report("device counts", place, len(counts), None, None)
        part = problem.narrowed(counts=(count,))
        if step_bound(part, limits) > most_s:
            continue
        outcome = (
            step_at_most(part, limits, tally, most_s) if most_s < float("inf") else least_step(part, limits, tally)
        )
        last = outcome if outcome.plan is not None or last is None else last
        stopped = limits.reached()
        if outcome.plan is not None and (outcome.objective_s or 0.0) <= most_s:
            bound = bound or count
            limits.report("device counts", len(counts), len(counts), None, None)
            return answered(
                problem,
                limits,
                tally,
                outcome.plan,
                name="num_devices",
                objective=float(count),
                bound=float(bound),
                gap=count / bound - 1.0,
                stopped=stopped if count > bound else None,
                counts=counts,
                words="fewest devices" + ("" if most_s == float("inf") else f" with a step of at most {most_s:.6g} s"),
            )
        if not proved_above(outcome, most_s):
            bound = bound or count
        if stopped is not None:
            break
    if stopped is None and bound is None:
        return _infeasible(problem, limits, tally, most_s)
    empty = last or least_step(problem, limits, tally)
    return unanswered(tally, empty, "num_devices").model_copy(
        update={"status": "no_solution", "termination": stopped or "time_limit", "bound": float(bound or counts[0])}
    )


def _infeasible(problem: Problem, limits: Limits, tally: Tally, most_s: float) -> PlanOutcome:
    """Return why no count has a plan: it fits nowhere, or the fastest plan of all counts is too slow."""
    everywhere = least_step(problem.narrowed(counts=tuple(reversed(device_choices(problem)))), limits, tally)
    found = unanswered(tally, below_deadline(problem, everywhere), "num_devices").model_copy(
        update={"status": "infeasible", "termination": None}
    )
    if found.diagnosis is None and everywhere.plan is not None:
        message = f"no number of devices has a step of at most {most_s:.6g} s"
        return found.model_copy(update={"diagnosis": Diagnosis(message=message, binding="step_deadline_s")})
    return found
