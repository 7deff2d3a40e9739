"""The least peak memory of the fullest device, and of the plans that reach it the fastest.

    min over plans of max over ranks of peak_r,   step <= the job's step deadline where there is one

Whether a plan below a limit m exists is the feasibility question of the search with m in place of the device's memory,
so m is bisected between what was proved impossible and the peak of the best plan found; each plan found lowers the
upper end to its own peak. When the two ends meet within the gap, the fastest plan within the upper end is searched.
This is mCAP's objective (Dreuning et al., Euro-Par 2022) over partition, recomputation, degrees and schedule at once.
"""

from __future__ import annotations

from dataclasses import replace

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Plan
from stagewright.planner.objectives.least_step import (
    Tally,
    answered,
    fitting,
    least_step,
    proved_above,
    step_at_most,
    unanswered,
)
from stagewright.planner.objectives.step_time import below_deadline
from stagewright.planner.search.limits import OPTIMAL_GAP, Limits, Termination
from stagewright.planner.search.problem import Problem

SLACK = 1e-9


def solve_min_max_memory(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of least peak memory over the declared space; ties go to the fastest."""
    tally = Tally()
    most_s = problem.job.step_deadline_s or float("inf")
    first = _some_plan(problem, limits, tally, most_s)
    if first.plan is None:
        return unanswered(tally, below_deadline(problem, first), "peak_memory_bytes")
    if (first.objective_s or 0.0) > most_s:
        return unanswered(tally, below_deadline(problem, first), "peak_memory_bytes")
    low, high, plan = problem.base_bytes, peak_of(first.plan), first.plan
    wanted = max(limits.gap, OPTIMAL_GAP / 2)
    stopped: Termination | None = None
    while high > low * (1.0 + wanted):
        stopped = limits.reached()
        if stopped is not None:
            break
        middle = 0.5 * (low + high)
        outcome = _some_plan(problem.narrowed(most_bytes=middle), limits, tally, most_s)
        if outcome.plan is not None and (outcome.objective_s or 0.0) <= most_s:
            high, plan = peak_of(outcome.plan), outcome.plan
        elif proved_above(outcome, most_s):
            low = middle
        else:
            stopped = outcome.termination or "time_limit"
            break
        limits.report("halving memory", tally.searches, tally.searches + 1, None, None)
    if stopped is None:
        within = problem.narrowed(most_bytes=high * (1 + SLACK))
        fastest = least_step(within, limits, tally, gap=max(limits.gap, OPTIMAL_GAP / 2))
        if fastest.plan is not None and fastest.plan.prediction.step_time_s < plan.prediction.step_time_s:
            plan = fastest.plan
    limits.report("halving memory", 1, 1, None, None)
    peak = peak_of(plan)
    low = min(low, peak)
    return answered(
        problem,
        limits,
        tally,
        plan,
        name="peak_memory_bytes",
        objective=peak,
        bound=low,
        gap=peak / low - 1.0 if low > 0 else 0.0,
        stopped=stopped,
        counts=problem.device_counts,
        words="least peak memory of the fullest device"
        + ("" if most_s == float("inf") else f" with a step of at most {most_s:.6g} s"),
    )


def peak_of(plan: Plan) -> float:
    """Return the peak of a plan's fullest device, bytes."""
    return max(plan.prediction.peak_memory_bytes)


def _some_plan(problem: Problem, limits: Limits, tally: Tally, most_s: float) -> PlanOutcome:
    if most_s == float("inf"):
        return fitting(problem, limits, tally)
    return step_at_most(problem, replace(limits, gap=max(limits.gap, 0.01)), tally, most_s)
