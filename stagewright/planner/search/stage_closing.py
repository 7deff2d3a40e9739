"""Closes one candidate of a search by stages: proves that no partition of it gets below a target, or finds one.

    1  caps       ranges of layers whose own bound reaches the target leave; no path through the rest: closed
    2  game       critical paths against partitions (`path_game`): a bound above the target closes, each new partition is
                  simulated and may be the new incumbent
    3  branch     what is left open is cut in two at the stage boundary on which the partitions disagree most

A few partitions are simulated one by one instead. Every boundary is fixed at the leaves, so with enough nodes the search
is exact; `most_nodes` ends it, and then the bound of what was left open counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.order import Cut, Layout, Order
from stagewright.planner.search.path_game import Mixtures, play
from stagewright.planner.search.problem import Partition, Problem
from stagewright.planner.search.space import FamilyRule
from stagewright.planner.search.stage_ranges import GRAPH, KIND_OF, StageTables, least_path, weighted_path

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

FEW_PARTITIONS = 24
MOST_ROUNDS = 40
MOST_PATHS = 24
_TOLERANCE = 1e-9


class Closable(Protocol):
    """What is closed: one candidate, or the least that several of them cost, which has no partitions to simulate."""

    problem: Problem
    rule: FamilyRule
    windows: Longs

    @property
    def is_one(self) -> bool: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def order(self) -> Order: ...
    @property
    def whole(self) -> tuple[int, ...]: ...
    @property
    def num_microbatches(self) -> int: ...
    @property
    def tables(self) -> StageTables: ...
    @property
    def hop_s(self) -> Floats: ...
    def complete(self, cuts: Sequence[int]) -> Partition | None: ...
    def step_s(self, partition: Partition) -> float: ...


@dataclass(frozen=True, eq=False)
class _Point:
    """What a partition costs in the relaxation, and mixtures of such: F, I, W [3, S], hops [E], tails [S]."""

    costs: Floats
    hop_s: Floats
    tail_s: Floats


@dataclass(eq=False)
class StageCloser:
    """The state of one candidate's proof.

    Parameters
    ----------
    target_s : asked anew at every step, because incumbents move it.
    found : told each partition that was simulated, with its step on links that never wait.
    known_s : a bound that is known.
    cuts : the partition that weighs most at the bound of the last node that stayed open.
    paths : critical paths to begin with, of any candidates on the same order; those that served a bound are added.
    """

    candidate: Closable
    target_s: Callable[[], float]
    found: Callable[[Partition, float], None]
    should_stop: Callable[[], bool]
    most_nodes: int = 400
    most_rounds: int = MOST_ROUNDS
    known_s: float = 0.0
    paths: list[Cut] = field(default_factory=list)
    simulated: int = 0
    nodes: int = 0
    cuts: tuple[int, ...] | None = None
    _paths: list[Cut] = field(default_factory=list)
    _tried: dict[tuple[int, ...], float] = field(default_factory=dict)

    def run(self) -> float:
        """Return a lower bound on the step of every partition that was not simulated; the target or more when closed."""
        self._paths = list(self.paths)
        waiting = [(self.known_s, self.candidate.windows)]
        least = float("inf")
        while waiting:
            at = min(range(len(waiting)), key=lambda index: (waiting[index][0], -index))
            bound_s, windows = waiting.pop(at)
            if bound_s >= self.target_s():
                least = min(least, bound_s)
                continue
            if self.nodes >= self.most_nodes or self.should_stop():
                return min([least, bound_s, *(other for other, _ in waiting)])
            self.nodes += 1
            value, parts = self._node(windows, bound_s)
            if not parts:
                least = min(least, value)
            waiting += [(value, part) for part in parts]
        return least

    @property
    def _kind(self) -> int:
        return KIND_OF[self.candidate.rule.bound] if self.candidate.layout.is_chain else GRAPH

    def _node(self, windows: Longs, bound_s: float) -> tuple[float, list[Longs]]:
        """Return the bound of a node and the parts that are still open; without parts the bound holds for all of it."""
        candidate, target = self.candidate, self.target_s()
        profile = candidate.problem.profile
        question = (candidate.num_microbatches, self._kind, profile.action_overhead_s, windows)
        below_s = target - profile.step_overhead_s
        bound, recompute = candidate.tables.bounds(*question, below_s=below_s)
        self._forbid(bound)
        value, cuts = least_path(bound)
        if np.isfinite(value):
            bound, recompute = candidate.tables.raised(bound, recompute, *question, below_s=below_s)
            self._forbid(bound)
            value, cuts = least_path(bound)
        if not np.isfinite(value):
            return max(target, bound_s), []
        bound_s = max(bound_s, value + profile.step_overhead_s)
        few = partitions_of(bound, FEW_PARTITIONS) if candidate.is_one else None
        if few is not None:
            for partition in few:
                self._try(partition)
            return max(bound_s, target), []
        return self._game(windows, bound, recompute, tuple(cuts.tolist()), bound_s)

    def _forbid(self, bound: Floats) -> None:
        """Leave no range that begins or ends inside layers that stay together."""
        for place in self.candidate.whole:
            bound[:, place, :] = bound[:, :, place] = np.inf

    def _try(self, cuts: tuple[int, ...]) -> None:
        """Simulate a partition, once."""
        if cuts in self._tried:
            return
        partition = self.candidate.complete(cuts)
        self._tried[cuts] = float("inf")
        if partition is not None:
            self._tried[cuts] = self.candidate.step_s(partition)
            self.simulated += 1
            self.found(partition, self._tried[cuts])

    def _game(
        self, windows: Longs, bound: Floats, recompute: Floats, first: tuple[int, ...], bound_s: float
    ) -> tuple[float, list[Longs]]:
        candidate = self.candidate
        extra_s = candidate.problem.profile.step_overhead_s
        columns: list[tuple[int, ...]] = []
        points: list[_Point] = []
        new: tuple[int, ...] | None = first
        solved: Mixtures | None = None
        above_s = float("inf")  # of what the game can prove: no combination of paths is above the makespan of a mixture
        mixture = np.ones(1)
        for _ in range(self.most_rounds):
            if new is not None:
                self._try(new)
                columns.append(new)
                points.append(self._point(new, recompute))
                above_s = min(above_s, self._add_path(points[-1])[0])
            solved = play(_lengths(self._paths, points))
            if solved is None:
                break
            mixture = solved.partitions
            value, cuts = self._weighted(bound, recompute, solved.paths)
            bound_s = max(bound_s, value + extra_s)
            if bound_s >= self.target_s():
                self._share(solved.paths)
                return bound_s, []
            if not candidate.is_one and above_s + extra_s < self.target_s():
                break
            new = tuple(cuts.tolist())
            new = None if new in columns else new
            length_s, is_new = self._add_path(_mixed(points, mixture), above_s=solved.value)
            above_s = min(above_s, length_s)
            if not is_new and new is None:
                break
        if solved is not None:
            self._share(solved.paths)
        self.cuts = columns[int(np.argmax(mixture))]
        return bound_s, _branches(windows, columns, mixture)

    def _share(self, weights: Floats) -> None:
        """Add the paths that have weight to those that other candidates begin with, the latest ones last."""
        for place in np.flatnonzero(weights > 0).tolist():
            path = self._paths[place]
            if not any(known is path for known in self.paths):
                self.paths.append(path)
        del self.paths[:-MOST_PATHS]

    def _point(self, cuts: tuple[int, ...], recompute: Floats) -> _Point:
        """Return the costs of a partition as the relaxation counts them: recomputation at its fractional least."""
        tables, order = self.candidate.tables, self.candidate.order
        overhead_s = self.candidate.problem.profile.action_overhead_s
        stages = np.arange(tables.num_stages)
        first, end = np.array(cuts[:-1]), np.array(cuts[1:])

        def between(prefix: Floats) -> Floats:
            return np.asarray(prefix[stages, end] - prefix[stages, first])

        costs = np.stack([between(tables.forward), between(tables.input_grad), between(tables.weight_grad)])
        costs[1] += recompute[stages, first, end]
        costs[:2] += overhead_s
        costs[2] += overhead_s if order.split else 0.0
        starts = np.array([cuts[target] for _, target in order.edges], dtype=np.int64)
        hops = self.candidate.hop_s[np.arange(len(starts)), starts] if len(starts) else np.zeros(0)
        return _Point(costs, hops, between(tables.step) + tables.latency)

    def _add_path(self, point: _Point, *, above_s: float = 0.0) -> tuple[float, bool]:
        """Return the makespan at a point, and whether its critical path is new and longer than `above_s`, and so kept."""
        length_s, path = self.candidate.order.trace(point.costs, point.hop_s, point.tail_s)
        if length_s <= above_s * (1 + _TOLERANCE):
            return length_s, False
        for known in self._paths:
            if (
                known.end_rank == path.end_rank
                and np.array_equal(known.counts, path.counts)
                and np.array_equal(known.hops, path.hops)
            ):
                return length_s, False
        self._paths.append(path)
        return length_s, True

    def _weighted(self, bound: Floats, recompute: Floats, weights: Floats) -> tuple[float, Longs]:
        """Return the least combination of the paths over all partitions of the node, and where it is."""
        tables, order = self.candidate.tables, self.candidate.order
        used = np.flatnonzero(weights > 0)
        counts = np.einsum("c,cks->ks", weights[used], np.stack([self._paths[c].counts for c in used]))
        hops = weights[used] @ np.stack([self._paths[c].hops for c in used])
        tails = np.zeros(tables.num_stages)
        for c in used.tolist():
            tails[self._paths[c].end_rank] += weights[c]
        hop_s = np.zeros_like(tables.forward)
        for edge, (_, target) in enumerate(order.edges):
            hop_s[target] += hops[edge] * self.candidate.hop_s[edge]
        return weighted_path(  # type: ignore[no-any-return]
            bound,
            recompute,
            tables.forward,
            tables.input_grad,
            tables.weight_grad,
            tables.step,
            tables.latency,
            counts,
            hop_s,
            tails,
            self.candidate.problem.profile.action_overhead_s,
            order.split,
        )


def _lengths(paths: Sequence[Cut], points: Sequence[_Point]) -> Floats:
    """Return the length of each path at each point, [C, K]."""
    counts = np.stack([path.counts.ravel() for path in paths]).astype(np.float64)
    hops = np.stack([path.hops for path in paths]).astype(np.float64)
    found = counts @ np.stack([point.costs.ravel() for point in points], axis=1)
    found += hops @ np.stack([point.hop_s for point in points], axis=1)
    return found + np.stack([point.tail_s for point in points], axis=1)[[path.end_rank for path in paths]]


def _mixed(points: Sequence[_Point], mixture: Floats) -> _Point:
    """Return the mean point."""
    return _Point(
        sum((m * p.costs for m, p in zip(mixture, points, strict=True)), np.zeros_like(points[0].costs)),
        sum((m * p.hop_s for m, p in zip(mixture, points, strict=True)), np.zeros_like(points[0].hop_s)),
        sum((m * p.tail_s for m, p in zip(mixture, points, strict=True)), np.zeros_like(points[0].tail_s)),
    )


def _branches(windows: Longs, columns: Sequence[tuple[int, ...]], mixture: Floats) -> list[Longs]:
    """Return the windows cut in two at the boundary on which the partitions of the mixture disagree most."""
    places = np.array(columns, dtype=np.float64)
    mean = mixture @ places[: len(mixture)]
    spread = mixture @ np.abs(places[: len(mixture)] - mean)
    width = windows[:, 1] - windows[:, 0]
    if not width.any():
        return []
    at = int(np.argmax(np.where(width > 0, spread + 1e-6 * width, -1.0)))
    below, above = windows.copy(), windows.copy()
    middle = int(np.clip(np.floor(mean[at]), windows[at, 0], windows[at, 1] - 1))
    below[at, 1], above[at, 0] = middle, middle + 1
    return [below, above]


def partitions_of(bound: Floats, most: int) -> list[tuple[int, ...]] | None:
    """Return every partition whose ranges all have a finite bound; None when there are more than `most`."""
    num_stages, places, _ = bound.shape
    paths: list[tuple[int, ...]] = [(places - 1,)]
    for stage in range(num_stages - 1, -1, -1):
        starts = np.isfinite(bound[stage])
        paths = [(int(first), *path) for path in paths for first in np.flatnonzero(starts[:, path[0]])]
        if len(paths) > 8 * most:
            return None
    found = [path for path in paths if path[0] == 0]
    return found if len(found) <= most else None
