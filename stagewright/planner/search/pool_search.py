"""The search over device pools: which pools lie along the pipeline, their ranks and degrees, and how layers are cut.

    1  skeletons   a sequence of pools, ranks for each, samples of a microbatch: bounded with every pool at its best
    2  sets        products of all degrees of the pools, under each single-chunk schedule, are closed together at what
                   any of them costs at least (`merged_candidate`); a set that stays open is cut in two where its
                   choices differ most
    3  candidates  a set of one is closed by itself (`stage_closing`), with target X = incumbent / (1 + gap)

Always the set of least bound is next, and one promising member of it is completed and simulated, so incumbent and bound
move together. All bounds hold for every partition and recomputation (`pool_bounds`, `choice_tables`), so what is left
out is proved to be no better than X; the proved bound is the least of X and the bounds of what a limit left open.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count as counting

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.least_work import least_step_s
from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.search.limits import KnownStep, LeastStep, Limits, Termination
from stagewright.planner.search.merged_candidate import MergedCandidate
from stagewright.planner.search.order import Cut, Order
from stagewright.planner.search.pool_bounds import best_choices, choice_bounds, least_before
from stagewright.planner.search.pool_space import PoolSpace, Skeleton, windows_of
from stagewright.planner.search.problem import Partition
from stagewright.planner.search.space import PIPELINE_OUTSIDE, FamilyRule
from stagewright.planner.search.stage_candidate import StageCandidate
from stagewright.planner.search.stage_closing import MOST_ROUNDS, StageCloser
from stagewright.planner.search.stage_graph import Edges
from stagewright.planner.search.work_count import WorkCount

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

NUM_STARTS = 16
MOST_NODES = 400
_TOGETHER_NODES = 1
_TOGETHER_ROUNDS = 12
_TRIAL_ROUNDS = 3
_BETWEEN_REPORTS = 16


@dataclass(frozen=True, eq=False)
class ChoiceSets:
    """Products of choices of a skeleton under one family.

    Parameters
    ----------
    rows : of each pool, which of the choices that take the skeleton's microbatch.
    """

    skeleton: Skeleton
    rule: FamilyRule
    rows: tuple[Longs, ...]

    @property
    def num_products(self) -> int:
        return int(np.prod([len(rows) for rows in self.rows]))

    def halves(self, merged: MergedCandidate) -> list[ChoiceSets]:
        """Return two sets that hold all products between them."""
        pool, parts = merged.cut_in_two()
        return [
            replace(self, rows=(*self.rows[:pool], self.rows[pool][part], *self.rows[pool + 1 :])) for part in parts
        ]


@dataclass(frozen=True, eq=False)
class Completed:
    """A completed candidate with its simulated step."""

    step_s: float
    candidate: StageCandidate
    partition: Partition


@dataclass(eq=False)
class PoolSearch:
    """The state of one search.

    Parameters
    ----------
    known : a step that is known to be reached, told of new ones.
    """

    space: PoolSpace
    limits: Limits
    known: KnownStep = field(default_factory=LeastStep)
    best: Completed | None = None
    kept: dict[str, Completed] = field(default_factory=dict)
    work: WorkCount = field(default_factory=WorkCount)
    num_candidates: int = 0
    open_bound_s: float = float("inf")
    _bounded: list[tuple[float, Skeleton]] = field(default_factory=list)
    _choice_bounds: dict[Skeleton, list[Floats]] = field(default_factory=dict)
    _paths: dict[tuple[str, Edges, int], list[Cut]] = field(default_factory=dict)
    _tried: set[tuple[Skeleton, str, tuple[int, ...]]] = field(default_factory=set)
    together: int = 0

    @property
    def incumbent_s(self) -> float:
        return min(self.known.least_s(), self.best.step_s if self.best is not None else float("inf"))

    @property
    def target_s(self) -> float:
        """A candidate that cannot get below this is closed."""
        return self.incumbent_s / (1.0 + self.limits.gap)

    def keep(self, candidate: StageCandidate, partition: Partition, step_s: float) -> None:
        """Note a simulated partition that may be the new incumbent, with its step on links that messages wait for."""
        if step_s >= self.incumbent_s:
            return
        if candidate.may_wait(partition):
            step_s = max(step_s, candidate.judged_step_s(partition))
        known = self.kept.get(candidate.summary)
        if known is None or step_s < known.step_s:
            self.kept[candidate.summary] = Completed(step_s, candidate, partition)
        if step_s < self.incumbent_s:
            self.best = self.kept[candidate.summary]
            self.known.offer(step_s)

    # ---- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> tuple[float, Termination]:
        """Search; return the proved bound over the space and why the search ended."""
        self.begin()
        return self.finish()

    def begin(self) -> None:
        """Bound the skeletons and find first plans."""
        self._bounded = self._bounded_skeletons()
        self._find_incumbents(self._bounded)

    def finish(self) -> tuple[float, Termination]:
        """Close what was bounded; return the proved bound over the space and why the search ended."""
        places = counting()
        heap: list[tuple[float, int, Skeleton | ChoiceSets]] = [
            (bound_s, next(places), skeleton) for bound_s, skeleton in self._bounded
        ]
        stopped: Termination | None = None
        done = 0
        while heap and heap[0][0] < self.target_s:
            stopped = self.limits.reached()
            if stopped is not None:
                self.open_bound_s = min(self.open_bound_s, heap[0][0])
                break
            bound_s, _, node = heapq.heappop(heap)
            parts = self._opened(node, bound_s) if isinstance(node, Skeleton) else self._searched(node, bound_s)
            for value, part in parts:
                heapq.heappush(heap, (max(bound_s, value), next(places), part))
            done += 1
            if done % _BETWEEN_REPORTS == 0:
                self.limits.report("pools", done, done + len(heap), self.best.step_s if self.best else None, bound_s)
        self._count_left(node for _, _, node in heap)
        proved = min(self.open_bound_s, self.target_s)
        if stopped is None and self.open_bound_s < self.target_s:
            stopped = self.limits.reached() or "time_limit"
        return proved, stopped or "gap"

    def _count_left(self, nodes: Iterable[Skeleton | ChoiceSets]) -> None:
        for node in nodes:
            if isinstance(node, Skeleton):
                self.work.count("pool bound")
            else:
                self.work.count("choice bound", node.num_products)

    def _find_incumbents(self, bounded: Sequence[tuple[float, Skeleton]]) -> None:
        """Complete the skeletons of least bound and idle time, each at the choices of its bound, under every family."""

        def guess(pair: tuple[float, Skeleton]) -> float:
            microbatches = self.space.problem.job.global_batch / pair[1].samples
            return pair[0] * (1.0 + 0.5 * (pair[1].num_ranks - 1) / microbatches)

        for _, skeleton in sorted(bounded, key=guess)[:NUM_STARTS]:
            needs = self.space.needs(skeleton)
            assert needs is not None
            chosen = best_choices(needs)
            rows = self.space.rows(skeleton)
            at = [int(rows[pool][2][index]) for pool, index in enumerate(chosen)]
            for rule in self.space.rules_for(skeleton):
                if self.limits.reached() is not None:
                    return
                candidate = self._candidate(skeleton, at, rule)
                if candidate is not None:
                    closer = self._closer(candidate, most_nodes=1, most_rounds=_TRIAL_ROUNDS)
                    closer.run()
                    self.work.simulated += closer.simulated

    def _bounded_skeletons(self) -> list[tuple[float, Skeleton]]:
        """Return the skeletons that may hold the model, by bound."""
        found = []
        extra_s = self.space.problem.profile.step_overhead_s
        known: dict[tuple[object, ...], float] = {}
        for skeleton in self.space.skeletons():
            if self.limits.reached() is not None:
                cluster = self.space.problem.cluster
                self.open_bound_s = least_step_s(self.space.problem.model(PIPELINE_OUTSIDE), cluster.num_devices)
                break
            key = (skeleton.pools, skeleton.ranks, skeleton.samples, skeleton.alike, skeleton.graph is None)
            if key not in known:
                needs = self.space.needs(skeleton, together=True)
                known[key] = (
                    float("nan") if needs is None else float(least_before([n[0] for n in needs])[-1][-1]) + extra_s
                )
            if np.isnan(known[key]):
                continue
            numbers = [
                len(self.space.pool_costs(skeleton, pool.group, pool.num_devices // count, False).latency_s)
                for pool, count in zip(skeleton.pools, skeleton.ranks, strict=True)
            ]
            self.num_candidates += int(np.prod(numbers)) * len(self.space.rules_for(skeleton))
            if np.isfinite(known[key]):
                found.append((known[key], skeleton))
            else:
                self.work.count("memory")
        found.sort(key=lambda pair: pair[0])
        return found

    def _opened(self, skeleton: Skeleton, bound_s: float) -> list[tuple[float, ChoiceSets]]:
        """Return all choices of a skeleton under every family."""
        needs = self.space.needs(skeleton)
        assert needs is not None
        extra_s = self.space.problem.profile.step_overhead_s
        self._choice_bounds[skeleton] = [bounds + extra_s for bounds in choice_bounds(needs)]
        every = tuple(np.arange(len(need)) for need in needs)
        sets = (self._narrowed(ChoiceSets(skeleton, rule, every)) for rule in self.space.rules_for(skeleton))
        return [(bound_s, each) for each in sets if each.num_products]

    def _narrowed(self, sets: ChoiceSets) -> ChoiceSets:
        """Return the sets without the choices that do not get below the target beside the best of all others."""
        bounds, target_s = self._choice_bounds[sets.skeleton], self.target_s
        left = tuple(rows[bounds[pool][rows] < target_s] for pool, rows in enumerate(sets.rows))
        found = replace(sets, rows=left)
        self.work.count("choice bound", sets.num_products - found.num_products)
        return found

    def _searched(self, sets: ChoiceSets, bound_s: float) -> list[tuple[float, ChoiceSets]]:
        """Close sets of choices together; return their halves, with their bound, where that leaves them open."""
        sets = self._narrowed(sets)
        if not sets.num_products:
            return []
        if sets.num_products == 1:
            candidate = self._candidate(sets.skeleton, self._shapes_of(sets), sets.rule)
            if candidate is not None:
                self._close(candidate, bound_s)
            return []
        merged = self._merged(sets)
        if merged is None:
            return []
        closer = self._closer(merged, most_nodes=_TOGETHER_NODES, most_rounds=_TOGETHER_ROUNDS, known_s=bound_s)
        try:
            value = closer.run()
        except InvalidSchedule:
            self.work.count("schedule", sets.num_products)
            return []
        self.together += 1
        if value >= self.target_s:
            self.work.count("together", sets.num_products)
            return []
        if closer.cuts is not None:
            self._try_one(sets, merged, closer.cuts)
        return [(value, part) for part in sets.halves(merged)]

    def _merged(self, sets: ChoiceSets) -> MergedCandidate | None:
        """Return what the sets cost at least; None when the family refuses the skeleton's sizes."""
        skeleton = sets.skeleton
        layout = self.space.layout(skeleton, sets.rule)
        if layout is None:
            self.work.count("schedule", sets.num_products)
            return None

        def order() -> Order:
            made = self.space.order(skeleton, sets.rule)
            if made is None:
                raise InvalidSchedule(f"{sets.rule.name} refuses its sizes", field="schedule")
            return made

        return MergedCandidate(
            self.space.problem,
            tuple(
                self.space.tables(skeleton, pool, count, layout).take(rows)
                for pool, count, rows in zip(skeleton.pools, skeleton.ranks, sets.rows, strict=True)
            ),
            skeleton.ranks,
            tuple(self.space.choices[pool.group].room_bytes for pool in skeleton.pools),
            skeleton.samples,
            sets.rule,
            layout,
            order,
            windows_of(skeleton, self.space.problem.profile.num_layers),
        )

    def _candidate(self, skeleton: Skeleton, chosen: Sequence[int], rule: FamilyRule) -> StageCandidate | None:
        """Return a candidate of the space; counts it and returns None when the family refuses its sizes."""
        candidate = self.space.candidate(skeleton, chosen, rule)
        if candidate is None:
            self.work.count("schedule")
        return candidate

    def _shapes_of(self, sets: ChoiceSets, chosen: Sequence[int] | None = None) -> list[int]:
        """Return the rows of the pools' price lists that are chosen of each set, the first one of each by default."""
        places = [0] * len(sets.rows) if chosen is None else chosen
        rows = self.space.rows(sets.skeleton)
        return [int(rows[pool][2][sets.rows[pool][place]]) for pool, place in enumerate(places)]

    def _try_one(self, sets: ChoiceSets, merged: MergedCandidate, cuts: tuple[int, ...]) -> None:
        """Complete the choices that look best for a partition, unless they were tried before."""
        at = self._shapes_of(sets, merged.likely(cuts))
        key = (sets.skeleton, sets.rule.name, tuple(at))
        if key in self._tried:
            return
        self._tried.add(key)
        candidate = self._candidate(sets.skeleton, at, sets.rule)
        if candidate is not None:
            closer = self._closer(candidate, most_nodes=1, most_rounds=_TRIAL_ROUNDS)
            closer.run()
            self.work.simulated += closer.simulated

    def _closer(
        self,
        candidate: StageCandidate | MergedCandidate,
        *,
        most_nodes: int = MOST_NODES,
        most_rounds: int = MOST_ROUNDS,
        known_s: float = 0.0,
    ) -> StageCloser:
        paths = self._paths.setdefault((candidate.rule.name, candidate.layout.edges, candidate.num_microbatches), [])
        return StageCloser(
            candidate,
            target_s=lambda: self.target_s,
            found=lambda partition, step_s: self._found(candidate, partition, step_s),
            should_stop=lambda: self.limits.reached() is not None,
            most_nodes=most_nodes,
            most_rounds=most_rounds,
            known_s=known_s,
            paths=paths,
        )

    def _found(self, candidate: StageCandidate | MergedCandidate, partition: Partition, step_s: float) -> None:
        assert isinstance(candidate, StageCandidate)
        self.keep(candidate, partition, step_s)

    def _close(self, candidate: StageCandidate, bound_s: float) -> None:
        closer = self._closer(candidate, known_s=bound_s)
        value = closer.run()
        self.work.evaluated += 1
        self.work.simulated += closer.simulated
        if value < self.target_s:
            self.open_bound_s = min(self.open_bound_s, value)
            self.work.count("left open")
