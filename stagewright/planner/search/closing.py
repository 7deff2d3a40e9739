"""Closing one candidate: a proof that none of its completions beats the target, or its best completion.

    few partitions   enumerate them (`enumeration`): exact
    light program    stage totals without recomputation and memory: a bound in a few milliseconds
    full program     levels and memory rows, same cuts
    integers         round the program's point and move layers; then the same rows with integer layers (`integer_program`)

Cuts belong to the order and not to the candidate, so those that carried a multiplier are kept for all candidates that
share the order. Kelley's iterates are drawn towards the best point known (Wentges smoothing), which saves half of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.cut_program import CutProgram, Point
from stagewright.planner.search.enumeration import Enumeration
from stagewright.planner.search.incumbent import Completion, complete, improve, start
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.order import Cut, OrderKey

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

LIGHT_ITERATIONS = 25
FULL_ITERATIONS = 40
_SMOOTHING = 0.85
_TOLERANCE = 1e-7


@dataclass(frozen=True, eq=False)
class Closed:
    """What became of a candidate: a bound on all its completions, its best completion, why, and the work done."""

    bound_s: float
    reason: str
    completion: Completion | None = None
    simulated: int = 0
    multipliers: tuple[tuple[Cut, float], ...] = ()


@dataclass(eq=False)
class Closer:
    """Closes candidates one after the other, sharing cuts among those of one order."""

    limits: Limits
    cuts: dict[OrderKey, list[Cut]] = field(default_factory=dict)
    num_programs: int = 0

    def close(
        self,
        costs: CandidateCosts,
        target_s: float,
        incumbent_s: float,
        known: Completion | None,
        judge: Callable[[Completion], Completion],
    ) -> Closed:
        """Return a bound of at least `target_s`, or the best bound and completion that were found."""
        enumeration = Enumeration(costs)
        if enumeration.is_small:
            best, simulated = enumeration.best(incumbent_s, judge)
            bound = incumbent_s if best is None else best.step_s
            return Closed(bound, "enumerated", best, simulated)
        self.num_programs += 1
        light = self._kelley(costs, target_s, memory=False, iterations=LIGHT_ITERATIONS)
        if light.bound_s >= target_s:
            return Closed(light.bound_s, "light program", simulated=light.simulated)
        full = self._kelley(costs, target_s, memory=True, iterations=FULL_ITERATIONS)
        simulated = light.simulated + full.simulated
        if full.bound_s >= target_s:
            return Closed(full.bound_s, "full program", simulated=simulated)
        completion = known if known is not None else start(costs)
        rounded = self._rounded(costs, full.point)
        for found in (completion, rounded):
            if found is not None and found.step_s < incumbent_s * 1.03:
                better = improve(costs, found)
                if completion is None or better.step_s < completion.step_s:
                    completion = better
        return Closed(max(light.bound_s, full.bound_s), "open", completion, simulated)

    def _kelley(self, costs: CandidateCosts, target_s: float, *, memory: bool, iterations: int) -> _Run:
        """Return the bound after Kelley's iterations, stopped when it passes the target or cannot."""
        program = CutProgram(costs, memory=memory)
        shared = self.cuts.setdefault(costs.order.key, [])
        used = list(shared)
        for cut in used:
            program.add(cut)
        simulated, bound = 0, -np.inf
        best: Point | None = None
        best_value = np.inf
        point: Point | None = None
        for _ in range(iterations):
            point = program.solve() if used else _even(costs)
            if point is None:
                return _Run(np.inf, None, simulated)
            bound = max(bound, point.bound_s * (1 - _TOLERANCE) if np.isfinite(point.bound_s) else -np.inf)
            if bound >= target_s:
                break
            points = [point] if best is None else [_between(best, point, _SMOOTHING), point]
            new = 0
            for trial in points:
                value, cut = _trace(costs, trial)
                simulated += 1
                if value < best_value:
                    best, best_value = trial, value
                if cut is not None and value > bound * (1 + _TOLERANCE):
                    program.add(cut)
                    used.append(cut)
                    new += 1
            if not new or (not memory and best_value < target_s):
                break
            if (
                memory
                and best_value < target_s * (1 - 1e-6)
                and bound < target_s
                and best_value - bound < 1e-4 * target_s
            ):
                break
        if used and program.num_cuts and point is not None and np.isfinite(point.bound_s):
            weights = program.duals() if new_enough(program, used) else np.zeros(0)
            carrying = [cut for cut, weight in zip(used, weights, strict=False) if weight > 1e-9]
            self.cuts[costs.order.key] = _merged(shared, carrying)
        return _Run(bound, best if best is not None else point, simulated)

    def _rounded(self, costs: CandidateCosts, point: Point | None) -> Completion | None:
        """Return the completion nearest to a program's point: cumulative layers rounded, then fitted."""
        if point is None:
            return None
        ends = np.rint(np.cumsum(point.layers.sum(axis=1))).astype(int)
        bounds = [0]
        for stage, end in enumerate(ends[:-1].tolist()):
            left = costs.num_stages - 1 - stage
            bounds.append(min(max(int(end), bounds[-1] + 1), costs.num_layers - left))
        return complete(costs, (*bounds, costs.num_layers))


@dataclass(frozen=True, eq=False)
class _Run:
    bound_s: float
    point: Point | None
    simulated: int


def new_enough(program: CutProgram, used: list[Cut]) -> bool:
    """Tell whether the solver's multipliers speak of all rows."""
    return program.num_cuts == len(used)


def _merged(shared: list[Cut], carrying: list[Cut]) -> list[Cut]:
    known = {id(cut) for cut in shared}
    return [*shared, *(cut for cut in carrying if id(cut) not in known)]


def _even(costs: CandidateCosts) -> Point:
    """Return the point with every run spread evenly over the stages it can stand on, and no bound."""
    from stagewright.planner.search.cut_program import reachable

    reach = reachable(costs).astype(np.float64)
    layers = reach * (costs.runs.length / np.maximum(reach.sum(axis=0), 1.0))
    return Point(-np.inf, layers, np.zeros((*layers.shape, 3)))


def _between(first: Point, second: Point, share: float) -> Point:
    return Point(
        -np.inf,
        share * first.layers + (1 - share) * second.layers,
        share * first.raised + (1 - share) * second.raised,
    )


def _trace(costs: CandidateCosts, point: Point) -> tuple[float, Cut]:
    """Return the step at a fractional point, with least hops and no ties, and its critical path."""
    times = costs.stage_costs(point.counts)  # type: ignore[arg-type]
    by_stage = point.layers @ costs.runs.step_s + costs.stage_latency_s
    if len(costs.replica_s):
        by_stage = by_stage + point.layers @ costs.replica_s + costs.replica_latency_s
    held = np.where(costs.slots.stage >= 0, by_stage[costs.slots.stage], 0.0)
    value, cut = costs.order.trace(times, costs.least_hop_s, costs.constant_tail_s + held.sum(axis=1))
    return value + costs.step_overhead_s, cut
