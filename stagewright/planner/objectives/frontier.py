"""The Pareto frontier of step time, peak memory and devices.

For each device count the fastest plan is searched, then the fastest with less memory than that one's peak, and so on
until nothing fits (epsilon constraint, Haimes et al. 1971). With gap 0 this visits every point of the frontier: a plan
with less memory than a point either is found by a later search or is no faster than what is found. With gap g the
memory limit falls by g at least between two points, so that for every plan of the space some point has at most as many
devices, at most (1 + g) times its step and (1 + g) times its peak. Points that another one beats are left out.
TensorOpt (Cai et al., TPDS 2022) tracks the same frontier layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagewright.planner.documents.outcome import FrontierPoint, PlanOutcome
from stagewright.planner.objectives.least_step import Tally, answered, device_choices, least_step, unanswered
from stagewright.planner.objectives.min_max_memory import SLACK, peak_of
from stagewright.planner.objectives.step_time import below_deadline
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.problem import Problem


def solve_frontier(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the frontier; its plan is the fastest point, its gap the largest of all points."""
    tally, counts = Tally(), device_choices(problem)
    points: list[FrontierPoint] = []
    stopped: Termination | None = None
    first: PlanOutcome | None = None
    for place, count in enumerate(counts):
        found, outcome, stopped = _by_memory(problem.narrowed(counts=(count,)), limits, tally)
        first = outcome if first is None or first.plan is None else first
        points += found
        limits.report("device counts", place + 1, len(counts), None, None)
        if stopped is not None:
            break
    limits.report("device counts", len(counts), len(counts), None, None)
    kept = pareto(points)
    if not kept:
        whole = problem.narrowed(counts=tuple(reversed(counts)))
        empty = least_step(whole, limits, tally) if stopped is None or first is None else first
        return unanswered(tally, below_deadline(problem, empty), "frontier")
    best = min(kept, key=lambda point: point.step_time_s)
    gap = max(max(0.0, point.step_time_s / point.bound_s - 1.0) for point in kept)
    outcome = answered(
        problem,
        limits,
        tally,
        best.plan,
        name="frontier",
        objective=best.step_time_s,
        bound=min(best.bound_s, best.step_time_s),
        gap=gap,
        stopped=stopped,
        counts=counts,
        words=f"points that no plan beats in devices, step and peak memory by more than {limits.gap:.3g}",
    )
    return outcome.model_copy(update={"frontier": tuple(kept)})


def pareto(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Return the points that no other one beats, by devices and then by memory; of equal ones the first stays."""

    def key(point: FrontierPoint) -> tuple[float, float, float]:
        return (point.num_devices, point.peak_memory_bytes, point.step_time_s)

    kept: list[FrontierPoint] = []
    for point in sorted(points, key=key):
        if not any(_beats(other, point) for other in kept):
            kept.append(point)
    return kept


def _beats(other: FrontierPoint, point: FrontierPoint) -> bool:
    return (
        other.num_devices <= point.num_devices
        and other.peak_memory_bytes <= point.peak_memory_bytes * (1 + SLACK)
        and other.step_time_s <= point.step_time_s * (1 + SLACK)
    )


def _by_memory(
    problem: Problem, limits: Limits, tally: Tally
) -> tuple[list[FrontierPoint], PlanOutcome, Termination | None]:
    """Return the points of one device count, from the fastest to the one of least memory, and what ended them."""
    most_s = problem.job.step_deadline_s or float("inf")
    points: list[FrontierPoint] = []
    first: PlanOutcome | None = None
    most = problem.capacity_bytes
    while True:
        outcome = least_step(problem.narrowed(most_bytes=most), limits, tally)
        first = first or outcome
        stopped = limits.reached()
        if outcome.plan is None:
            return points, first, stopped if outcome.status == "infeasible" else outcome.termination
        step_s, peak = outcome.plan.prediction.step_time_s, peak_of(outcome.plan)
        if step_s > most_s:
            return points, first, stopped
        points.append(
            FrontierPoint(
                num_devices=outcome.plan.num_devices,
                step_time_s=step_s,
                peak_memory_bytes=peak,
                bound_s=min(outcome.bound_s or 0.0, step_s),
                plan=outcome.plan,
            )
        )
        if stopped is not None:
            return points, first, stopped
        most = peak / (1.0 + max(limits.gap, SLACK))
