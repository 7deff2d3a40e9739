"""What the search over device pools may choose: pools along the pipeline, ranks, degrees, schedules and stage graphs.

A skeleton is a sequence of pools, ranks for each and the samples of a microbatch. Each pool then takes one of its choices
(degrees, ZeRO, shares), and all ranks one schedule of one stage a rank. What a pool's choices cost by class of layers is
priced once for each number of devices of a rank (`joined_choice`, `pricing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.planned_schedule import OPTIONS
from stagewright.planner.search.choice_tables import ChoiceTables
from stagewright.planner.search.joined_choice import Choices, choices_by_group
from stagewright.planner.search.order import Layout, Order, OrderKey
from stagewright.planner.search.pool_bounds import EVERY, PoolCosts, pool_needs
from stagewright.planner.search.pools import Pool, pool_sequences, used_first
from stagewright.planner.search.pricing import Priced
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import PIPELINE_OUTSIDE, FamilyRule, allows, divisors
from stagewright.planner.search.stage_candidate import Levels, PoolChoice, StageCandidate
from stagewright.planner.search.stage_choice import BRANCHING, SHARED, shares_weights
from stagewright.planner.search.stage_graph import (
    MOST_RANKS,
    Edges,
    StageGraph,
    compile_graph_order,
    graph_rules,
    graph_schedule,
    stage_graphs,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Alike = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Skeleton:
    """Pools along the pipeline, pipeline ranks of each, samples of a microbatch; a graph unless stages form a chain.

    `alike` are columns of `pricing.SHAPE` with the values that the choices of all pools have in them.
    """

    pools: tuple[Pool, ...]
    ranks: tuple[int, ...]
    samples: int
    graph: StageGraph | None = None
    alike: Alike = ()

    @property
    def num_ranks(self) -> int:
        return sum(self.ranks)


@dataclass(eq=False)
class PoolSpace:
    """The candidates of a problem over pools.

    Parameters
    ----------
    split : cut one kind of device in two pools as well.
    chains : chains of stages; else graphs of stages alone.
    alone : chains of stages on one node group as well; else they are searched elsewhere.
    """

    problem: Problem
    split: bool = False
    chains: bool = True
    alone: bool = True
    _models: dict[tuple[str, ...], CostModel] = field(default_factory=dict)
    _costs: dict[tuple[str, int, int, Alike, bool], PoolCosts] = field(default_factory=dict)
    _graphs: dict[int, list[StageGraph | None]] = field(default_factory=dict)
    _graph_orders: dict[tuple[str, Edges, int], Order] = field(default_factory=dict)
    _choice_tables: dict[tuple[str, int, int, Alike, float], ChoiceTables] = field(default_factory=dict)

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
        return _single_chunk(self.problem.rules)

    @cached_property
    def levels(self) -> Levels:
        return Levels(self.problem.classes, self.problem.levels)

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
                        yield from self._alike(Skeleton(pools, ranks, samples, graph))

    def _alike(self, skeleton: Skeleton) -> Iterator[Skeleton]:
        """Yield the skeleton for each way in which all pools can make the choices that a run takes only alike."""
        columns = list(self.alike_columns(skeleton))
        if not columns:
            yield skeleton
            return
        ways = [
            {tuple(way) for way in priced.shape[rows][:, columns].tolist()} for _, priced, rows in self.rows(skeleton)
        ]
        for way in sorted(set.intersection(*ways)):
            yield replace(skeleton, alike=tuple(zip(columns, way, strict=True)))

    def alike_columns(self, skeleton: Skeleton) -> tuple[int, ...]:
        """Return the columns in which all pools of a skeleton are alike: of shared weights, and on graphs of stages."""
        if len(skeleton.pools) == 1:
            return ()
        shared = SHARED if shares_weights(self.problem.profile, self.problem.job) else ()
        return tuple(sorted({*shared, *(() if skeleton.graph is None else BRANCHING)}))

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
            found.append((group, priced, chosen_rows(priced, samples, skeleton.samples, skeleton.alike)))
        return found

    def rules_for(self, skeleton: Skeleton) -> list[FamilyRule]:
        """Return the families that take the skeleton's sizes; on one rank the first, since orders do not matter."""
        if skeleton.graph is not None:
            return self.graph_rules
        count = self.problem.job.global_batch // skeleton.samples
        fitting = [rule for rule in self.rules if rule.fits(skeleton.num_ranks, count, 1)]
        return fitting[:1] if skeleton.num_ranks == 1 else fitting

    # ---- costs -----------------------------------------------------------------------------------------------------

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
            costs = self.pool_costs(skeleton, pool.group, pool.num_devices // count, together)
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

    def pool_costs(self, skeleton: Skeleton, name: str, num_devices: int, together: bool) -> PoolCosts:
        """Return what a group's choices cost on so many devices; with `together` one row, the least of all of them."""
        key = (name, num_devices, skeleton.samples, skeleton.alike, together)
        if key not in self._costs:
            priced, of_row = self.choices[name].priced(num_devices)
            rows = chosen_rows(priced, of_row, skeleton.samples, skeleton.alike)
            each = PoolCosts.of(priced.take(rows), list(self.problem.levels))
            self._costs[key] = each.together() if together else each
        return self._costs[key]

    def tables(self, skeleton: Skeleton, pool: Pool, num_ranks: int, layout: Layout) -> ChoiceTables:
        """Return what a pool's choices cost by ranges of layers, at the share of a backward that the layout splits."""
        size = pool.num_devices // num_ranks
        key = (pool.group, size, skeleton.samples, skeleton.alike, layout.split_share)
        if key not in self._choice_tables:
            priced, of_row = self.choices[pool.group].priced(size)
            rows = chosen_rows(priced, of_row, skeleton.samples, skeleton.alike)
            self._choice_tables[key] = ChoiceTables.of(priced.take(rows), list(self.problem.levels), layout)
        return self._choice_tables[key]

    # ---- candidates ------------------------------------------------------------------------------------------------

    def candidate(self, skeleton: Skeleton, chosen: Sequence[int], rule: FamilyRule) -> StageCandidate | None:
        """Return the candidate of a row of each pool's price list; None when the family refuses its sizes."""
        choices = tuple(
            PoolChoice(pool, count, group, priced.shape[row])
            for pool, count, (group, priced, _), row in zip(
                skeleton.pools, skeleton.ranks, self.rows(skeleton), chosen, strict=True
            )
        )
        return self.of_choices(skeleton, choices, rule)

    def of_choices(
        self, skeleton: Skeleton, choices: tuple[PoolChoice, ...], rule: FamilyRule
    ) -> StageCandidate | None:
        """Return the candidate of a choice for each pool; None when the family refuses its sizes."""
        order = self.order(skeleton, rule)
        if order is None:
            return None
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

    def layout(self, skeleton: Skeleton, rule: FamilyRule) -> Layout | None:
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


def _single_chunk(rules: Sequence[FamilyRule]) -> list[FamilyRule]:
    """Return the families that place one stage on each rank, once."""
    return [rule for rule in rules if rule.num_replicas == 1 and tuple(rule.chunks(8)) == (1,)]


def chosen_rows(priced: Priced, of_row: Longs, samples: int, alike: Alike) -> Longs:
    """Return the rows that take microbatches of so many samples, and have the values that pools have alike."""
    rows = np.flatnonzero(of_row == samples)
    return rows[admitted(priced.shape[rows], alike)]


def admitted(shapes: Ints, alike: Alike) -> npt.NDArray[np.bool_]:
    """Return which rows of SHAPE have the values that pools have alike."""
    found = np.ones(len(shapes), dtype=np.bool_)
    for column, value in alike:
        found &= shapes[:, column] == value
    return found


def windows_of(skeleton: Skeleton, num_layers: int) -> Longs:
    """Return where each stage of a skeleton may start, int64 [S + 1, 2]."""
    if skeleton.graph is not None:
        return np.array(skeleton.graph.windows, dtype=np.int64)
    return _chain_windows(skeleton.num_ranks, num_layers)


def _chain_windows(num_stages: int, num_layers: int) -> Longs:
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
