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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count as counting
from itertools import product

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.least_work import least_step_s
from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.planned_schedule import OPTIONS
from stagewright.planner.search.choice_tables import ChoiceTables
from stagewright.planner.search.joined_choice import Choices, choices_by_group
from stagewright.planner.search.limits import KnownStep, LeastStep, Limits, Termination
from stagewright.planner.search.merged_candidate import MergedCandidate
from stagewright.planner.search.order import Cut, Layout, Order, OrderKey
from stagewright.planner.search.pool_bounds import (
    EVERY,
    PoolCosts,
    best_choices,
    choice_bounds,
    least_before,
    pool_needs,
)
from stagewright.planner.search.pools import Pool, pool_sequences, used_first
from stagewright.planner.search.pricing import Priced
from stagewright.planner.search.problem import Partition, Problem
from stagewright.planner.search.space import PIPELINE_OUTSIDE, FamilyRule, allows, divisors
from stagewright.planner.search.stage_candidate import Levels, PoolChoice, StageCandidate
from stagewright.planner.search.stage_closing import MOST_ROUNDS, StageCloser
from stagewright.planner.search.stage_graph import (
    MOST_RANKS,
    Edges,
    StageGraph,
    compile_graph_order,
    graph_rules,
    graph_schedule,
    stage_graphs,
)
from stagewright.planner.search.work_count import WorkCount

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

NUM_STARTS = 16
MOST_NODES = 400
_TOGETHER_NODES = 1
_TOGETHER_ROUNDS = 12
_TRIAL_ROUNDS = 3
_BETWEEN_REPORTS = 16


@dataclass(frozen=True)
class Skeleton:
    """Pools along the pipeline, pipeline ranks of each, samples of a microbatch; a graph unless stages form a chain."""

    pools: tuple[Pool, ...]
    ranks: tuple[int, ...]
    samples: int
    graph: StageGraph | None = None

    @property
    def num_ranks(self) -> int:
        return sum(self.ranks)


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
    split : cut one kind of device in two pools as well.
    chains : search chains of stages; else graphs of stages alone.
    alone : search chains of stages on one node group as well; else they are searched elsewhere.
    known : a step that is known to be reached, told of new ones.
    """

    problem: Problem
    limits: Limits
    split: bool = False
    chains: bool = True
    alone: bool = True
    known: KnownStep = field(default_factory=LeastStep)
    best: Completed | None = None
    kept: dict[str, Completed] = field(default_factory=dict)
    work: WorkCount = field(default_factory=WorkCount)
    num_candidates: int = 0
    open_bound_s: float = float("inf")
    _models: dict[tuple[str, ...], CostModel] = field(default_factory=dict)
    _costs: dict[tuple[str, int, int, bool], PoolCosts] = field(default_factory=dict)
    _graphs: dict[int, list[StageGraph | None]] = field(default_factory=dict)
    _graph_orders: dict[tuple[str, Edges, int], Order] = field(default_factory=dict)
    _bounded: list[tuple[float, Skeleton]] = field(default_factory=list)
    _choice_tables: dict[tuple[str, int, int, float], ChoiceTables] = field(default_factory=dict)
    _choice_bounds: dict[Skeleton, list[Floats]] = field(default_factory=dict)
    _paths: dict[tuple[str, Edges, int], list[Cut]] = field(default_factory=dict)
    _tried: set[tuple[Skeleton, str, tuple[int, ...]]] = field(default_factory=set)
    together: int = 0

    @cached_property
    def sequences(self) -> list[tuple[Pool, ...]]:
        return pool_sequences(self.problem.cluster, split=self.split, join=self.joins)

    @cached_property
    def joins(self) -> bool:
        """Whether pools of several node groups are searched: experts are not split over them."""
        shape = self.problem.profile.architecture
        return shape is None or not shape.num_experts

    @cached_property
    def choices(self) -> dict[str, Choices]:
        """Degrees and costs by node group, and by joined pool."""
        return choices_by_group(self.problem, {pool for pools in self.sequences for pool in pools})

    @cached_property
    def rules(self) -> list[FamilyRule]:
        """The families of one stage a rank."""
        return single_chunk(self.problem.rules)

    @cached_property
    def levels(self) -> Levels:
        return Levels(self.problem.classes, self.problem.levels)

    @property
    def incumbent_s(self) -> float:
        return min(self.known.least_s(), self.best.step_s if self.best is not None else float("inf"))

    @property
    def target_s(self) -> float:
        """A candidate that cannot get below this is closed."""
        return self.incumbent_s / (1.0 + self.limits.gap)

    # ---- the space -------------------------------------------------------------------------------------------------

    def skeletons(self) -> Iterator[Skeleton]:
        """Yield every skeleton in a fixed order."""
        job, layers = self.problem.job, self.problem.profile.num_layers - len(self.problem.uncut)
        for pools in self.sequences:
            for ranks in product(*(pool.rank_counts for pool in pools)):
                if sum(ranks) > layers or not allows(job.space, "pp", sum(ranks)):
                    continue
                if not allows(job.space, "chunks", 1):
                    continue
                sizes = [pool.num_devices // count for pool, count in zip(pools, ranks, strict=True)]
                if self.split and len(pools) > 1 and not _aligned(pools, sizes, self.problem):
                    continue
                on_one = len(pools) == 1 and not pools[0].parts
                for graph in self.graphs(sum(ranks)):
                    if graph is None and on_one and not self.alone:
                        continue
                    for samples in divisors(job.global_batch):
                        yield Skeleton(pools, ranks, samples, graph)

    def graphs(self, num_ranks: int) -> list[StageGraph | None]:
        """Return the stage graphs of a depth, None for the chain; others only for a model that is no chain."""
        if num_ranks not in self._graphs:
            branching = num_ranks <= MOST_RANKS and self.side_by_side
            found = stage_graphs(self.problem.profile, num_ranks) if branching else ()
            self._graphs[num_ranks] = [*([None] if self.rules and self.chains else []), *found]
        return self._graphs[num_ranks]

    @cached_property
    def side_by_side(self) -> bool:
        """Tell whether the model has branches and the job admits a schedule that runs them side by side."""
        return bool(self.graph_rules) and not self.problem.profile.is_chain

    @cached_property
    def graph_rules(self) -> list[FamilyRule]:
        """The families of stage graphs."""
        return graph_rules(self.problem.job.space)

    def rows(self, skeleton: Skeleton) -> list[tuple[Choices, Priced, Longs]]:
        """Return for each pool its choices and the rows of them that take the skeleton's microbatch."""
        found = []
        for pool, count in zip(skeleton.pools, skeleton.ranks, strict=True):
            group = self.choices[pool.group]
            priced, samples = group.priced(pool.num_devices // count)
            found.append((group, priced, np.flatnonzero(samples == skeleton.samples)))
        return found

    # ---- bounds of pools -------------------------------------------------------------------------------------------

    def needs(self, skeleton: Skeleton, *, together: bool = False) -> list[Floats] | None:
        """Return what each choice of each pool needs for layers [j, i), [choices, j, i]; None without a choice.

        The first pool begins at 0 and the last one ends at L; all other j and i are L + 1 places.
        With `together`, one row a pool that bounds all of its choices: each layer at the least of any of them.
        """
        of_layer = self.problem.classes.of_layer
        microbatches = self.problem.job.global_batch // skeleton.samples
        found = []
        head = np.zeros(len(of_layer) + 1)
        ahead = np.full(len(of_layer), np.inf)
        for place, (pool, count) in enumerate(zip(skeleton.pools, skeleton.ranks, strict=True)):
            costs = self._pool_costs(pool.group, pool.num_devices // count, skeleton.samples, together)
            firsts = slice(0, 1) if place == 0 else EVERY
            if not len(costs.latency_s):
                return None
            need = pool_needs(
                costs.time_s[:, of_layer],
                costs.share,
                costs.step_s[:, of_layer],
                costs.least_bytes[:, of_layer],
                of_layer.astype(np.int64),
                costs.latency_s + 2.0 * microbatches * self.problem.profile.action_overhead_s,
                microbatches,
                count,
                self.choices[pool.group].room_bytes,
                chain=skeleton.graph is None,
                firsts=firsts,
                ends=slice(-1, None) if place == len(skeleton.pools) - 1 else EVERY,
            )
            found.append(need if skeleton.graph is not None else need + head[None, firsts, None])
            ahead = np.minimum(ahead, costs.forward_s[:, of_layer].min(axis=0))
            head = np.concatenate((np.zeros(1), np.cumsum(ahead)))
        return found

    def _pool_costs(self, name: str, num_devices: int, samples: int, together: bool) -> PoolCosts:
        key = (name, num_devices, samples, together)
        if key not in self._costs:
            priced, of_row = self.choices[name].priced(num_devices)
            each = PoolCosts.of(priced.take(np.flatnonzero(of_row == samples)), list(self.problem.levels))
            self._costs[key] = each.together() if together else each
        return self._costs[key]

    # ---- candidates ------------------------------------------------------------------------------------------------

    def candidate(self, skeleton: Skeleton, chosen: Sequence[int], rule: FamilyRule) -> StageCandidate | None:
        """Return a candidate; None when the family refuses its sizes."""
        order = self.order(skeleton, rule)
        if order is None:
            self.work.count("schedule")
            return None
        choices = tuple(
            PoolChoice(pool, count, group, priced.shape[row])
            for pool, count, (group, priced, _), row in zip(
                skeleton.pools, skeleton.ranks, self.rows(skeleton), chosen, strict=True
            )
        )
        return StageCandidate(
            self.problem,
            self.model(skeleton.pools),
            choices,
            skeleton.samples,
            rule,
            order,
            windows_of(skeleton, self.problem.profile.num_layers),
            self.levels,
        )

    def order(self, skeleton: Skeleton, rule: FamilyRule) -> Order | None:
        """Return the compiled order of a family; None when the family refuses its sizes."""
        if skeleton.graph is not None:
            return self._graph_order(rule.name, skeleton.graph, self.problem.job.global_batch // skeleton.samples)
        try:
            return self.problem.order_of(self._key(skeleton, rule), rule)
        except (InvalidArgument, InvalidSchedule):
            return None

    def _layout(self, skeleton: Skeleton, rule: FamilyRule) -> Layout | None:
        """Return the layout of a family's order; None when the family refuses its sizes."""
        if skeleton.graph is not None:
            return self.order(skeleton, rule)
        try:
            return self.problem.layout_of(self._key(skeleton, rule), rule)
        except (InvalidArgument, InvalidSchedule):
            return None

    def _key(self, skeleton: Skeleton, rule: FamilyRule) -> OrderKey:
        return OrderKey(rule.name, skeleton.num_ranks, self.problem.job.global_batch // skeleton.samples, 1)

    def _graph_order(self, family: str, graph: StageGraph, num_microbatches: int) -> Order:
        key = (family, graph.edges, num_microbatches)
        if key not in self._graph_orders:
            self._graph_orders[key] = compile_graph_order(
                graph_schedule(family, graph.edges, graph.num_stages, num_microbatches)
            )
        return self._graph_orders[key]

    def model(self, pools: tuple[Pool, ...]) -> CostModel:
        """Return the cost model of the cluster with the used groups first."""
        cluster = used_first(self.problem.cluster, pools)
        key = tuple(group.name for group in cluster.groups)
        if key not in self._models:
            self._models[key] = CostModel(self.problem.profile, cluster, self.problem.job, OPTIONS, PIPELINE_OUTSIDE)
        return self._models[key]

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
            microbatches = self.problem.job.global_batch / pair[1].samples
            return pair[0] * (1.0 + 0.5 * (pair[1].num_ranks - 1) / microbatches)

        for _, skeleton in sorted(bounded, key=guess)[:NUM_STARTS]:
            needs = self.needs(skeleton)
            assert needs is not None
            chosen = best_choices(needs)
            rows = self.rows(skeleton)
            at = [int(rows[pool][2][index]) for pool, index in enumerate(chosen)]
            for rule in self.rules_for(skeleton):
                if self.limits.reached() is not None:
                    return
                candidate = self.candidate(skeleton, at, rule)
                if candidate is not None:
                    closer = self._closer(candidate, most_nodes=1, most_rounds=_TRIAL_ROUNDS)
                    closer.run()
                    self.work.simulated += closer.simulated

    def _bounded_skeletons(self) -> list[tuple[float, Skeleton]]:
        """Return the skeletons that may hold the model, by bound."""
        found = []
        extra_s = self.problem.profile.step_overhead_s
        known: dict[tuple[object, ...], float] = {}
        for skeleton in self.skeletons():
            if self.limits.reached() is not None:
                cluster = self.problem.cluster
                self.open_bound_s = least_step_s(self.problem.model(PIPELINE_OUTSIDE), cluster.num_devices)
                break
            key = (skeleton.pools, skeleton.ranks, skeleton.samples, skeleton.graph is None)
            if key not in known:
                needs = self.needs(skeleton, together=True)
                known[key] = (
                    float("nan") if needs is None else float(least_before([n[0] for n in needs])[-1][-1]) + extra_s
                )
            if np.isnan(known[key]):
                continue
            numbers = [
                len(self._pool_costs(pool.group, pool.num_devices // count, skeleton.samples, False).latency_s)
                for pool, count in zip(skeleton.pools, skeleton.ranks, strict=True)
            ]
            self.num_candidates += int(np.prod(numbers)) * len(self.rules_for(skeleton))
            if np.isfinite(known[key]):
                found.append((known[key], skeleton))
            else:
                self.work.count("memory")
        found.sort(key=lambda pair: pair[0])
        return found

    def rules_for(self, skeleton: Skeleton) -> list[FamilyRule]:
        """Return the families that take the skeleton's sizes; on one rank the first, since orders do not matter."""
        if skeleton.graph is not None:
            return self.graph_rules
        count = self.problem.job.global_batch // skeleton.samples
        fitting = [rule for rule in self.rules if rule.fits(skeleton.num_ranks, count, 1)]
        return fitting[:1] if skeleton.num_ranks == 1 else fitting

    def _opened(self, skeleton: Skeleton, bound_s: float) -> list[tuple[float, ChoiceSets]]:
        """Return all choices of a skeleton under every family."""
        needs = self.needs(skeleton)
        assert needs is not None
        extra_s = self.problem.profile.step_overhead_s
        self._choice_bounds[skeleton] = [bounds + extra_s for bounds in choice_bounds(needs)]
        every = tuple(np.arange(len(need)) for need in needs)
        sets = (self._narrowed(ChoiceSets(skeleton, rule, every)) for rule in self.rules_for(skeleton))
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
            candidate = self.candidate(sets.skeleton, self._shapes_of(sets), sets.rule)
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
        layout = self._layout(skeleton, sets.rule)
        if layout is None:
            self.work.count("schedule", sets.num_products)
            return None

        def order() -> Order:
            made = self.order(skeleton, sets.rule)
            if made is None:
                raise InvalidSchedule(f"{sets.rule.name} refuses its sizes", field="schedule")
            return made

        return MergedCandidate(
            self.problem,
            tuple(
                self._tables(pool, count, skeleton.samples, layout).take(rows)
                for pool, count, rows in zip(skeleton.pools, skeleton.ranks, sets.rows, strict=True)
            ),
            skeleton.ranks,
            tuple(self.choices[pool.group].room_bytes for pool in skeleton.pools),
            skeleton.samples,
            sets.rule,
            layout,
            order,
            windows_of(skeleton, self.problem.profile.num_layers),
        )

    def _tables(self, pool: Pool, num_ranks: int, samples: int, layout: Layout) -> ChoiceTables:
        size = pool.num_devices // num_ranks
        key = (pool.group, size, samples, layout.split_share)
        if key not in self._choice_tables:
            priced, of_row = self.choices[pool.group].priced(size)
            self._choice_tables[key] = ChoiceTables.of(
                priced.take(np.flatnonzero(of_row == samples)), list(self.problem.levels), layout
            )
        return self._choice_tables[key]

    def _shapes_of(self, sets: ChoiceSets, chosen: Sequence[int] | None = None) -> list[int]:
        """Return the rows of the pools' price lists that are chosen of each set, the first one of each by default."""
        places = [0] * len(sets.rows) if chosen is None else chosen
        rows = self.rows(sets.skeleton)
        return [int(rows[pool][2][sets.rows[pool][place]]) for pool, place in enumerate(places)]

    def _try_one(self, sets: ChoiceSets, merged: MergedCandidate, cuts: tuple[int, ...]) -> None:
        """Complete the choices that look best for a partition, unless they were tried before."""
        at = self._shapes_of(sets, merged.likely(cuts))
        key = (sets.skeleton, sets.rule.name, tuple(at))
        if key in self._tried:
            return
        self._tried.add(key)
        candidate = self.candidate(sets.skeleton, at, sets.rule)
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


def single_chunk(rules: Sequence[FamilyRule]) -> list[FamilyRule]:
    """Return the families that place one stage on each rank, once."""
    return [rule for rule in rules if rule.num_replicas == 1 and tuple(rule.chunks(8)) == (1,)]


def windows_of(skeleton: Skeleton, num_layers: int) -> Longs:
    """Return where each stage of a skeleton may start, int64 [S + 1, 2]."""
    if skeleton.graph is not None:
        return np.array(skeleton.graph.windows, dtype=np.int64)
    return chain_windows(skeleton.num_ranks, num_layers)


def chain_windows(num_stages: int, num_layers: int) -> Longs:
    """Return where each stage may start, each stage holding at least one layer, int64 [S + 1, 2]."""
    stage = np.arange(num_stages + 1)
    return (
        np.stack((np.where(stage < num_stages, stage, num_layers), num_layers - (num_stages - stage)), axis=1)
        * (stage > 0)[:, None]
    )


def _aligned(pools: Sequence[Pool], sizes: Sequence[int], problem: Problem) -> bool:
    """Tell whether the ranks of every pool spread over as few units of every link level as the first devices would.

    The cost model prices a rank's groups at the start of its node group.
    """
    for pool, size in zip(pools, sizes, strict=True):
        for level in problem.cluster.groups[0].links:
            unit = level.num_devices
            for start in range(pool.first, pool.first + pool.num_devices, size):
                if (start + size - 1) // unit - start // unit != (size - 1) // unit:
                    return False
    return True
