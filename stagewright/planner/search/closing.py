"""Closing one candidate: a proof that none of its completions beats the target, or its best completion.

    mean path        the multipliers of other candidates of the order (`multipliers`): a bound in a tenth of a millisecond
    light program    stage totals without recomputation and memory: a bound in a few milliseconds
    few partitions   enumerate them (`enumeration`): exact
    full program     levels and memory rows, same cuts
    branching        whole layers, levels and workspaces (`branching`): what is found lowers the target of all that follow,
                     no node left is the proof

Cuts belong to the order and not to the candidate, so those that carried a multiplier are kept for all candidates that
share the order. Kelley's iterates are drawn towards the best point known (Wentges smoothing), which saves half of them; the
first one towards where another candidate of the order ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.branching import Branching, Split
from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.cut_program import CutProgram, Form, Point, between, reachable
from stagewright.planner.search.enumeration import Enumeration, Judge
from stagewright.planner.search.incumbent import Completion, improve, staircase
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.multipliers import MeanPath, bound_by, mean_path
from stagewright.planner.search.order import Cut, OrderKey

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

LIGHT_ITERATIONS = 25
FULL_ITERATIONS = 12
MOST_PATHS = 16  # mean paths of an order
MOST_KNOWN = 512  # paths of an order
MOST_NODES, MOST_NODES_IN_ALL = 200, 3_000
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
    paths: dict[OrderKey, list[MeanPath]] = field(default_factory=dict)
    trees: dict[tuple[OrderKey, bytes], Split] = field(default_factory=dict)
    ends: dict[tuple[OrderKey, Form], Point] = field(default_factory=dict)
    num_programs: int = 0
    num_nodes: int = 0

    def close(
        self,
        costs: CandidateCosts,
        target_s: float,
        incumbent_s: float,
        rank_layers: tuple[Longs, Longs] | None,
        judge: Judge | None = None,
    ) -> Closed:
        """Return a bound of at least `target_s`, or the best bound, with the completion its program leads to.

        Without a judge nothing is enumerated.
        """
        known_s = self._known_bound(costs, target_s, rank_layers)
        if known_s >= target_s:
            return Closed(known_s, "light program")
        self.num_programs += 1
        light = self._kelley(costs, target_s, rank_layers, form="light", iterations=LIGHT_ITERATIONS)
        if light.bound_s >= target_s:
            return Closed(light.bound_s, "light program", simulated=light.simulated)
        enumeration = Enumeration(costs)
        enumerated = enumeration.best(incumbent_s, judge) if judge is not None and enumeration.is_small else None
        if enumerated is not None:
            found, made = enumerated
            bound_s = incumbent_s if found is None else found.step_s
            return Closed(bound_s, "enumerated", found, light.simulated + made)
        full = self._kelley(costs, target_s, rank_layers, form="full", iterations=FULL_ITERATIONS)
        simulated = light.simulated + full.simulated
        if full.bound_s >= target_s:
            return Closed(full.bound_s, "full program", simulated=simulated)
        best: Completion | None = None
        if full.point is not None:
            best, made = self._near(costs, full.point, incumbent_s)
            simulated += made
        return Closed(max(light.bound_s, full.bound_s), "open", best, simulated)

    def _known_bound(self, costs: CandidateCosts, target_s: float, rank_layers: tuple[Longs, Longs] | None) -> float:
        """Return the bound that the multipliers of other candidates of the order give; zero without any."""
        paths = self.paths.get(costs.order.key, [])
        if rank_layers is None or costs.order.num_replicas > 1 or not paths:
            return 0.0
        return bound_by(costs, paths, rank_layers, target_s * (1 + _TOLERANCE)) * (1 - _TOLERANCE)

    def close_whole(
        self,
        costs: CandidateCosts,
        bound_s: float,
        target_s: float,
        incumbent_s: float,
        rank_layers: tuple[Longs, Longs] | None,
        judge: Judge,
    ) -> Closed:
        """Return what branching proves of a candidate that linear programs left open with `bound_s`.

        A completion that lowers the incumbent lowers the target by as much.
        """
        simulated = 0

        def complete(point: Point, is_whole: bool) -> Completion | None:
            nonlocal simulated
            if is_whole:
                found, made = _as_it_is(costs, point), 1
            else:
                found, made = self._near(costs, point, incumbent_s)
            simulated += made
            return None if found is None else judge(found)

        shared = self.cuts.setdefault(costs.order.key, [])
        program = CutProgram(costs, form="whole", target_s=target_s, rank_layers=rank_layers)
        branching = Branching(
            costs,
            program,
            shared,
            target_s,
            self.limits.gap,
            _trace,
            complete,
            lambda: self.limits.reached() is not None,
            self.trees.setdefault((costs.order.key, program.wholes.kind.tobytes()), Split()),
            inner=self.ends.get((costs.order.key, "full")),
        )
        nodes = min(MOST_NODES, MOST_NODES_IN_ALL - self.num_nodes)
        proved_s = branching.run(nodes)
        self.num_nodes += branching.num_nodes
        self.cuts[costs.order.key] = _merged(list(branching.carrying.values()), shared)
        simulated += branching.simulated
        reason = "branching" if proved_s >= branching.target_s else "open"
        return Closed(max(bound_s, proved_s), reason, branching.best, simulated)

    def _keep_path(self, costs: CandidateCosts, cuts: list[Cut], weights: Floats) -> None:
        path = mean_path(costs, cuts, weights) if cuts and len(cuts) == len(weights) else None
        if path is not None:
            paths = self.paths.setdefault(costs.order.key, [])
            paths.insert(0, path)
            del paths[MOST_PATHS:]

    @staticmethod
    def _near(costs: CandidateCosts, point: Point, incumbent_s: float) -> tuple[Completion | None, int]:
        """Return a completion near a fractional point, or near a staircase, moved where it is promising, and the simulations."""
        starts = [_rounded(costs, point)]
        stairs = staircase(costs)
        if stairs is not None:
            starts.append(stairs)
        found = [improve(costs, bounds, most_steps=0)[0] for bounds in starts]
        steps = [np.inf if one is None else one.step_s for one in found]
        first = int(np.argmin(steps))
        if steps[first] > _PROMISING * incumbent_s:
            return found[first], len(starts)
        best, made = improve(costs, starts[first])
        return best, made + len(starts)

    def _kelley(
        self,
        costs: CandidateCosts,
        target_s: float,
        rank_layers: tuple[Longs, Longs] | None,
        *,
        form: Form,
        iterations: int,
    ) -> _Run:
        """Return the bound after Kelley's iterations, stopped when it passes the target or cannot."""
        key = costs.order.key
        simulated, bound, best_value = 0, -np.inf, np.inf
        best = self.ends.get((key, form)) if form == "light" else None
        if best is not None and not _is_within(costs, best, rank_layers):
            best = None
        new: list[Cut] = []
        if best is not None:
            best_value, cut = _trace(costs, best)
            simulated += 1
            new.append(cut)
            if best_value < target_s:
                return _Run(-np.inf, best, simulated)
        enough_s = target_s * (1 + 2 * _TOLERANCE)
        program = CutProgram(costs, form=form, target_s=enough_s, rank_layers=rank_layers)
        shared = self.cuts.setdefault(key, [])
        program.add(shared)
        point: Point | None = None
        for turn in range(iterations):
            program.add(new)
            point = program.solve() if program.cuts else _even(costs)
            if point is None:
                bound = enough_s
                break
            bound = max(bound, point.bound_s * (1 - _TOLERANCE) if np.isfinite(point.bound_s) else -np.inf)
            if bound >= target_s:
                break
            points = [point] if best is None else [between(best, point, _SMOOTHING), point]
            new = []
            for trial in points:
                value, cut = _trace(costs, trial)
                simulated += 1
                if value < best_value:
                    best, best_value = trial, value
                if value > bound * (1 + _TOLERANCE):
                    new.append(cut)
            if not new or (form == "light" and best_value < target_s) or turn == iterations - 1:
                break
            if (
                form == "full"
                and best_value < target_s * (1 - 1e-6)
                and bound < target_s
                and best_value - bound < _CLOSE_ENOUGH * target_s
            ):
                break
        if best is not None:
            self.ends[key, form] = best
        if program.cuts and (point is None or np.isfinite(point.bound_s)):
            weights = program.multipliers()
            carrying = [cut for cut, weight in zip(program.cuts, weights, strict=True) if weight > 1e-9]
            if form == "light" and bound >= target_s:
                self._keep_path(costs, carrying, weights[weights > 1e-9])
            self.cuts[key] = _merged(carrying, [*new, *shared])
        return _Run(bound, best if best is not None else point, simulated)


def _as_it_is(costs: CandidateCosts, point: Point) -> Completion | None:
    """Return a whole point with the levels that the program chose; None when it is no completion that fits."""
    counts = np.rint(_counts(costs, point)).astype(np.int64)
    layers = counts.sum(axis=2)
    ends = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(layers.sum(axis=1))))
    if (counts < 0).any() or (costs.layers_of(ends) != layers).any() or not costs.fits(counts):
        return None
    bounds = tuple(ends.tolist())
    step_s, cut = costs.trace(counts, bounds)
    return Completion(step_s, bounds, counts, cut)


def _counts(costs: CandidateCosts, point: Point) -> Floats:
    """Return layers by level, [S, K, 3], with those that are not raised at the weakest level that is allowed."""
    counts, base = point.counts, int(np.argmax(costs.levels))
    if base:
        counts[:, :, base] += counts[:, :, 0]
        counts[:, :, 0] = 0.0
    return counts


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


def _merged(first: list[Cut], others: list[Cut]) -> list[Cut]:
    """Return the first ones and those of the others that are not among them, at most MOST_KNOWN."""
    known = {id(cut) for cut in first}
    return [*first, *(cut for cut in others if id(cut) not in known)][:MOST_KNOWN]


def _is_within(costs: CandidateCosts, point: Point, rank_layers: tuple[Longs, Longs] | None) -> bool:
    """Tell whether a point of another candidate of the order obeys the limits on layers of ranks."""
    if rank_layers is None:
        return True
    of_class = costs.classes.run_class
    on_rank = costs.slots.held @ point.layers[:, of_class == of_class[costs.bulk_run]].sum(axis=1)
    low, high = rank_layers
    return bool(((on_rank >= low - 1e-6) & (on_rank <= high + 1e-6)).all())


def _even(costs: CandidateCosts) -> Point:
    """Return the point with every run spread evenly over the stages it can stand on, and no bound."""
    reach = reachable(costs).astype(np.float64)
    layers = reach * (costs.runs.length / np.maximum(reach.sum(axis=0), 1.0))
    return Point(-np.inf, layers, np.zeros((*layers.shape, 3)))


def _trace(costs: CandidateCosts, point: Point) -> tuple[float, Cut]:
    """Return the step at a fractional point, with least hops and no ties, and its critical path."""
    times = costs.stage_costs(_counts(costs, point))  # type: ignore[arg-type]
    times[1] += point.extra_s
    by_stage = point.layers @ costs.runs.step_s + costs.stage_latency_s
    if len(costs.replica_s):
        by_stage = by_stage + point.layers @ costs.replica_s + costs.replica_latency_s
    held = np.where(costs.slots.stage >= 0, by_stage[costs.slots.stage], 0.0)
    value, cut = costs.order.trace(times, costs.least_hop_s, costs.constant_tail_s + held.sum(axis=1))
    return value + costs.step_overhead_s, cut
