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
from stagewright.planner.search.cut_program import CutProgram, Point, reachable
from stagewright.planner.search.enumeration import Enumeration
from stagewright.planner.search.incumbent import Completion, improve
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.order import Cut, OrderKey

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

LIGHT_ITERATIONS = 25
FULL_ITERATIONS = 40
_SMOOTHING = 0.85
_TOLERANCE = 1e-7
_PROMISING = 1.06  # a rounded point this far above the incumbent is not improved
_CLOSE_ENOUGH = 1e-3  # between a program's bound and its simulated point, where it cannot close any more


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

    def enumerated(
        self, costs: CandidateCosts, incumbent_s: float, judge: Callable[[Completion], Completion]
    ) -> Closed | None:
        """Return the best completion of a candidate with few partitions, None for others."""
        enumeration = Enumeration(costs)
        if not enumeration.is_small:
            return None
        best, simulated = enumeration.best(incumbent_s, judge)
        return Closed(incumbent_s if best is None else best.step_s, "enumerated", best, simulated)

    def close(
        self, costs: CandidateCosts, target_s: float, incumbent_s: float, rank_layers: tuple[Longs, Longs] | None
    ) -> Closed:
        """Return a bound of at least `target_s`, or the best bound, with the completion its program leads to."""
        self.num_programs += 1
        light = self._kelley(costs, target_s, rank_layers, memory=False, iterations=LIGHT_ITERATIONS)
        if light.bound_s >= target_s:
            return Closed(light.bound_s, "light program", simulated=light.simulated)
        full = self._kelley(costs, target_s, rank_layers, memory=True, iterations=FULL_ITERATIONS)
        simulated = light.simulated + full.simulated
        if full.bound_s >= target_s:
            return Closed(full.bound_s, "full program", simulated=simulated)
        best: Completion | None = None
        if full.point is not None:
            best, made = improve(costs, _rounded(costs, full.point), give_up_s=_PROMISING * incumbent_s)
            simulated += made
        return Closed(max(light.bound_s, full.bound_s), "open", best, simulated)

    def _kelley(
        self,
        costs: CandidateCosts,
        target_s: float,
        rank_layers: tuple[Longs, Longs] | None,
        *,
        memory: bool,
        iterations: int,
    ) -> _Run:
        """Return the bound after Kelley's iterations, stopped when it passes the target or cannot."""
        program = CutProgram(costs, memory=memory, rank_layers=rank_layers)
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
                and best_value - bound < _CLOSE_ENOUGH * target_s
            ):
                break
        if used and program.num_cuts and point is not None and np.isfinite(point.bound_s):
            weights = program.duals() if new_enough(program, used) else np.zeros(0)
            carrying = [cut for cut, weight in zip(used, weights, strict=False) if weight > 1e-9]
            self.cuts[costs.order.key] = _merged(shared, carrying)
        return _Run(bound, best if best is not None else point, simulated)


def _rounded(costs: CandidateCosts, point: Point) -> Longs:
    """Return bounds near a program's point: ranks to whole layers by largest remainders, then stages inside each rank.

    Every stage keeps at least one layer. With two replicas the stages are rounded at once.
    """
    wanted = point.layers.sum(axis=1)
    if costs.order.num_replicas > 1:
        sizes = _whole(wanted, costs.num_layers)
    else:
        held = [[slot.stage for slot in slots] for slots in costs.order.slots]
        ranks = _whole(np.array([wanted[stages].sum() for stages in held]), costs.num_layers, [len(s) for s in held])
        sizes = np.ones(costs.num_stages, dtype=np.int64)
        for stages, total in zip(held, ranks.tolist(), strict=True):
            sizes[stages] = _whole(wanted[stages], total)
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(sizes)))


def _whole(wanted: Floats, total: int, least: list[int] | None = None) -> Longs:
    """Return integers near `wanted` that sum to `total`, each at least its least (1): largest remainders."""
    lowest = np.ones(len(wanted), dtype=np.int64) if least is None else np.array(least, dtype=np.int64)
    sizes = np.maximum(np.floor(wanted + 1e-9).astype(np.int64), lowest)
    while sizes.sum() < total:
        sizes[int(np.argmax(wanted - sizes))] += 1
    while sizes.sum() > total:
        sizes[int(np.argmin(np.where(sizes > lowest, wanted - sizes, np.inf)))] -= 1
    return sizes


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
