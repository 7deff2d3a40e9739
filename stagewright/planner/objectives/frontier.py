"""The Pareto frontier of step time, peak memory and devices.

For each device count the fastest plan is searched, then the fastest below a memory limit (epsilon constraint, Haimes et
al. 1971), the limits chosen so that few of them tell how all plans lie (Vassilvitskii and Yannakakis, TCS 2005). What
is not known yet are spans of memory: plans of one device count that need more than `low` and at most `high` bytes, none
of them faster than the bound that a search with more memory proved. A span is closed when some point has at most as
many devices, at most (1 + gap) `low` bytes and a step of at most (1 + gap) times that bound; else a search inside
splits it. The widest span comes first, the smallest count where none fits yet: a frontier that is stopped early covers
all counts and all memory, coarsely, and says how widely. With gap 0 a span is searched from its upper end, point by
point, which visits the whole frontier. TensorOpt (Cai et al., TPDS 2022) tracks the same frontier layer by layer.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count as counting

from stagewright.planner.documents.outcome import FrontierPoint, PlanOutcome
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
from stagewright.planner.objectives.min_max_memory import SLACK, peak_of
from stagewright.planner.objectives.step_time import below_deadline
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.problem import Problem


@dataclass(frozen=True)
class Span:
    """Plans of `count` devices that need more than `low` and at most `high` bytes, none faster than `bound_s`."""

    count: int
    low: float
    high: float
    bound_s: float

    def gap_to(self, points: Iterable[FrontierPoint]) -> float:
        """Return the least g for which some point is at most (1 + g) times worse than every plan of the span."""
        ratios = (
            max(point.peak_memory_bytes / self.low, point.step_time_s / self.bound_s)
            for point in points
            if point.num_devices <= self.count
        )
        return min(ratios, default=math.inf) - 1.0


@dataclass
class OpenFrontier:
    """The points found so far, and the spans where others may be missing, the widest first."""

    points: list[FrontierPoint] = field(default_factory=list)
    _spans: list[tuple[float, int, Span]] = field(default_factory=list)
    _places: Iterator[int] = field(default_factory=counting)

    @property
    def num_spans(self) -> int:
        return len(self._spans)

    def leave_open(self, span: Span) -> None:
        """Note where plans may be missing."""
        if span.low < span.high:
            heapq.heappush(self._spans, (-span.gap_to(self.points), next(self._places), span))

    def widest(self) -> tuple[float, Span] | None:
        """Take the span with the largest gap to the points; None when there is none. Points only make gaps smaller."""
        while self._spans:
            _, place, span = heapq.heappop(self._spans)
            gap = span.gap_to(self.points)
            if not self._spans or gap >= -self._spans[0][0]:
                return gap, span
            heapq.heappush(self._spans, (-gap, place, span))
        return None


def solve_frontier(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the frontier; its plan is the fastest point, its gap the largest of its points and of what was left open."""
    tally, counts, frontier = Tally(), device_choices(problem), OpenFrontier()
    for count in counts:
        bound_s = step_bound(problem.narrowed(counts=(count,)), limits)
        if bound_s < math.inf:
            frontier.leave_open(Span(count, max(1.0, problem.base_bytes), problem.capacity_bytes, bound_s))
    stopped: Termination | None = None
    gap, outcome = 0.0, None
    while (widest := frontier.widest()) is not None:
        gap, span = widest
        stopped = limits.reached()
        if gap <= limits.gap + SLACK or stopped is not None:
            break
        outcome, stopped = _split(problem, limits, tally, frontier, span)
        if stopped is not None:
            break
        limits.report("frontier", tally.searches, tally.searches + frontier.num_spans, None, None)
        gap = 0.0
    limits.report("frontier", tally.searches, tally.searches, None, None)
    kept = pareto(frontier.points)
    if not kept:
        if stopped is None or outcome is None:
            outcome = least_step(problem.narrowed(counts=tuple(reversed(counts))), limits, tally)
        return unanswered(tally, below_deadline(problem, outcome), "frontier")
    best = min(kept, key=lambda point: point.step_time_s)
    own = max(point.step_time_s / point.bound_s - 1.0 for point in kept)
    left = (1.0 + gap) * max(1.0, (1.0 + own) / (1.0 + limits.gap)) - 1.0
    answer = answered(
        problem,
        limits,
        tally,
        best.plan,
        name="frontier",
        objective=best.step_time_s,
        bound=min(best.bound_s, best.step_time_s),
        gap=max(own, left),
        stopped=stopped,
        counts=counts,
        words=f"points that no plan beats in devices, step and peak memory by more than {limits.gap:.3g}",
    )
    return answer.model_copy(update={"frontier": tuple(kept)})


def _split(
    problem: Problem, limits: Limits, tally: Tally, frontier: OpenFrontier, span: Span
) -> tuple[PlanOutcome, Termination | None]:
    """Search inside a span and leave open what is still unknown of it; return the search, and what ended it too early."""
    whole = span.high == problem.capacity_bytes
    limit = span.high if whole or limits.gap == 0.0 else 0.5 * (span.low + span.high)
    most_s = problem.job.step_deadline_s or math.inf
    outcome = step_at_most(problem.narrowed(counts=(span.count,), most_bytes=limit), limits, tally, most_s)
    above = Span(span.count, limit, span.high, span.bound_s)
    if outcome.plan is None or outcome.plan.prediction.step_time_s > most_s:
        if not proved_above(outcome, most_s):
            frontier.leave_open(span)
            return outcome, outcome.termination or "time_limit"
        frontier.leave_open(above)
        return outcome, None
    step_s, peak, bound_s = outcome.plan.prediction.step_time_s, peak_of(outcome.plan), outcome.bound_s or 0.0
    frontier.points.append(
        FrontierPoint(
            num_devices=outcome.plan.num_devices,
            step_time_s=step_s,
            peak_memory_bytes=peak,
            bound_s=min(bound_s, step_s),
            plan=outcome.plan,
        )
    )
    # What the point's own gap is beyond the wanted one counts in the answer.
    reachable_s = max(bound_s, step_s / (1.0 + limits.gap))
    frontier.leave_open(Span(span.count, span.low, peak / (1.0 + SLACK), reachable_s))
    frontier.leave_open(above)
    return outcome, limits.reached()


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
