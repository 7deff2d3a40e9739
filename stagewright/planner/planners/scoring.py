"""From a planner's choices to an outcome: every planner is scored by the common simulator."""

from __future__ import annotations

from collections.abc import Sequence

from stagewright.planner.documents.outcome import Alternative, PlanOutcome
from stagewright.planner.documents.plan import Plan
from stagewright.planner.prediction import evaluate
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Candidate, Partition, Problem


def scored(problem: Problem, candidate: Candidate, partition: Partition, planner: str) -> Plan:
    """Return the plan of a choice with its prediction."""
    plan = problem.plan(candidate, partition, planner)
    return plan.model_copy(update={"prediction": evaluate(plan, problem.profile).prediction})


def candidates_outcome(
    problem: Problem,
    limits: Limits,
    choices: Sequence[tuple[Candidate, Partition]],
    planner: str,
    *,
    num_candidates: int | None = None,
) -> PlanOutcome:
    """Return the outcome of a planner that proves nothing: its best choice that fits by simulated step, then the rest.

    A planner that finds nothing says `no_solution`: only a planner that searched everything may say infeasible.
    """
    limit_bytes = problem.capacity_bytes * (1 + 1e-12)
    fitting = []
    for candidate, partition in choices:
        if problem.takes(candidate) and (problem.pipeline(candidate, partition).peak_bytes <= limit_bytes).all():
            fitting.append((problem.step_s(candidate, partition), candidate, partition))
    fitting.sort(key=lambda item: item[0])
    plans = [(item, scored(problem, item[1], item[2], planner)) for item in fitting[: limits.top + 1]]
    plans.sort(key=lambda pair: pair[1].prediction.step_time_s)
    best = plans[0][1] if plans else None
    count = len(choices) if num_candidates is None else num_candidates
    return PlanOutcome(
        status="feasible" if best is not None else "no_solution",
        plan=best,
        objective_s=None if best is None else best.prediction.step_time_s,
        bound_s=None,
        gap=None,
        candidates=count,
        evaluated=len(choices),
        simulated=len(choices),
        wall_s=0.0,
        alternatives=tuple(
            Alternative(
                summary=item[1].summary,
                step_time_s=plan.prediction.step_time_s,
                peak_memory_bytes=max(plan.prediction.peak_memory_bytes),
                plan=plan,
            )
            for item, plan in plans[1:]
        ),
    )
