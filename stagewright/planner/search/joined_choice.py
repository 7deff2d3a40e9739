"""What each stage may choose on several node groups joined to one pool: degrees, ZeRO stage, samples of each replica.

States that ZeRO divides lie in equal shares, or in proportion to what devices have room for.
A rank of a pool of N devices on D ranks has N_g / D devices of each group g. With tp * cp of them a replica there are
dp = sum_g N_g / (D tp cp) replicas, whose shares of a microbatch of M samples `balanced_shares` gives. Rows are priced as
those of one group (`pricing`) and merged by the rules of `joined_costs`. Experts are not split over such a pool, and models
that have some are not searched on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.joined_replicas import joined_replicas
from stagewright.planner.cost.roofline import peak_flops
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.replica_shares import ReplicaPart
from stagewright.planner.search.joined_costs import balanced_shares, joined_layer_costs, merged, shards_of
from stagewright.planner.search.layer_costs import LayerCosts, cut_bytes
from stagewright.planner.search.pools import Pool, used_first
from stagewright.planner.search.pricing import (
    DP,
    MICROBATCH,
    SHAPE,
    ClassTable,
    Priced,
    SizeTables,
    class_table,
    combined_rows,
    configuration_of,
    group_costs,
    no_rows,
    unique_rows,
)
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import allows, divisors, inner_splits
from stagewright.planner.search.stage_choice import GroupChoices, undominated_of_each

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

NUM_DEGREES = len(SHAPE)


@dataclass(eq=False)
class JoinedChoices:
    """The choices on a joined pool, by devices of a rank.

    Rows are those of `pricing.SHAPE` with the largest share as the microbatch, behind them the samples of a replica of each
    part, and whether states are held in proportion to memory.

    Parameters
    ----------
    problem : the question with the pool's groups first.
    pool : a pool of several parts; members : the choices on each of their groups alone.
    """

    problem: Problem
    pool: Pool
    members: tuple[GroupChoices, ...]
    _priced: dict[int, tuple[Priced, Longs]] = field(default_factory=dict)
    _costs: dict[bytes, LayerCosts] = field(default_factory=dict)
    _tables: dict[tuple[int, ...], ClassTable | None] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem, pool: Pool, members: tuple[GroupChoices, ...]) -> JoinedChoices:
        """Return the empty list for a pool."""
        cluster = used_first(problem.cluster, (pool,))
        return cls(Problem(problem.profile, cluster, problem.job, cluster.num_devices), pool, members)

    @property
    def group(self) -> str:
        return self.pool.group

    @cached_property
    def room_bytes(self) -> float:
        """Bytes of the device with least room for what depends on the plan; rows are weighed against it."""
        return min(self._rooms)

    @cached_property
    def _rooms(self) -> list[float]:
        return [member.room_bytes for member in self.members]

    @cached_property
    def _differ(self) -> bool:
        """Whether devices differ in room by more than a hundredth."""
        return max(self._rooms) > 1.01 * min(self._rooms)

    @cached_property
    def _rates(self) -> list[float]:
        precision = self.problem.job.precision
        return [peak_flops(member.problem.cluster.groups[0].device, precision) for member in self.members]

    def priced(self, num_devices: int) -> tuple[Priced, Longs]:
        """Return the undominated choices of ranks of `num_devices`, and the samples M of a microbatch of each."""
        if num_devices not in self._priced:
            shapes, samples = self.shapes(num_devices)
            priced, legal = self.price(shapes)
            samples = samples[legal]
            keep = undominated_of_each(priced, samples, self.members[0].apart)
            self._priced[num_devices] = (priced.take(keep), samples[keep])
        return self._priced[num_devices]

    def costs(self, shape: Ints) -> LayerCosts:
        """Return the layer costs of a row, bytes weighed against the least room."""
        key = shape.tobytes()
        if key not in self._costs:
            model = self.problem.model(("tp", "cp", "dp", "pp"))
            degrees = configuration_of(shape[:NUM_DEGREES]).degrees
            self._costs[key] = joined_layer_costs(model, degrees, self.parts(shape), room_bytes=self._rooms)
        return self._costs[key]

    def parts(self, shape: Ints) -> tuple[ReplicaPart, ...]:
        """Return the replicas of a row on each group."""
        return self._parts(int(shape[DP]), [int(share) for share in shape[NUM_DEGREES:-1]], bool(shape[-1]))

    def _parts(self, dp: int, samples: Sequence[int], by_memory: bool) -> tuple[ReplicaPart, ...]:
        whole = self.pool.num_devices
        counts = [dp * part.num_devices // whole for part in self.pool.parts]
        room = sum(count * each for count, each in zip(counts, self._rooms, strict=True))
        return tuple(
            ReplicaPart(part.group, count, own, each / room if by_memory else None)
            for part, count, own, each in zip(self.pool.parts, counts, samples, self._rooms, strict=True)
        )

    def shapes(self, num_devices: int) -> tuple[Ints, Longs]:
        """Return the rows of ranks of `num_devices`, admitted or not, and the samples of a microbatch of each."""
        profile, job = self.problem.profile, self.problem.job
        space, whole = job.space, self.pool.num_devices
        sizes = [part.num_devices * num_devices // whole for part in self.pool.parts]
        per_node = min(member.per_node for member in self.members)
        zeros = [zero for zero in sorted(set(space.zero)) if allows(space, "zero", zero)]
        known: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        rows: list[tuple[int, ...]] = []
        samples: list[int] = []
        for tp, cp, variants in inner_splits(profile, job, gcd(*sizes), per_node):
            counts = [size // (tp * cp) for size in sizes]
            if not allows(space, "dp", sum(counts)):
                continue
            for whole_batch in divisors(job.global_batch):
                key = (tp * cp, whole_batch)
                if key not in known:
                    known[key] = [
                        shares
                        for shares in balanced_shares(counts, self._rates, whole_batch)
                        if max(shares) <= space.max_microbatch
                        and all(allows(space, "microbatch", share) for share in shares)
                    ]
                new = [
                    (tp, cp, sum(counts), 1, 1, 1, sp, vocabulary, zero, max(shares), 1, 0, *shares, by_memory)
                    for shares in known[key]
                    for sp, vocabulary in variants
                    for zero in zeros
                    for by_memory in ((0, 1) if zero and self._differ else (0,))
                ]
                rows += new
                samples += [whole_batch] * len(new)
        width = NUM_DEGREES + len(sizes) + 1
        return np.array(rows, dtype=np.int32).reshape(-1, width), np.array(samples, dtype=np.int64)

    def price(self, shapes: Ints) -> tuple[Priced, npt.NDArray[np.bool_]]:
        """Return the rows that the cost model admits on every group, and which those are."""
        tables = [self._class_tables(index, shapes) for index in range(len(self.members))]
        legal = np.array([all(table is not None for table in row) for row in zip(*tables, strict=True)], dtype=bool)
        if not legal.any():
            empty = no_rows(len(self.problem.classes.first))
            return empty, legal
        admitted = shapes[legal]
        parts = [
            self._part(index, admitted, [table for table, good in zip(rows, legal, strict=True) if good and table])
            for index, rows in enumerate(tables)
        ]
        weights = [self.room_bytes / room for room in self._rooms]
        return merged(replace(parts[0], shape=admitted), parts, weights), legal

    def _part(self, index: int, shapes: Ints, tables: list[ClassTable]) -> Priced:
        """Return rows as the replicas on one group see them."""
        member = self.members[index]
        stacked = {
            name: np.stack([getattr(table, name) for table in tables]) for name in ClassTable.__dataclass_fields__
        }
        keys, where = unique_rows(shapes[:, [0, 1, DP, 8, shapes.shape[1] - 1]])
        traffic = np.array([self._traffic(index, *key) for key in keys.tolist()])[where]
        own = shapes[:, :NUM_DEGREES].copy()
        own[:, MICROBATCH] = shapes[:, NUM_DEGREES + index]
        return combined_rows(own, stacked, traffic, traffic, member.problem.price_list.model)

    def _traffic(self, index: int, tp: int, cp: int, dp: int, zero: int, by_memory: int) -> tuple[float, ...]:
        """Return what one parameter's replicas over all groups cost one on group `index`."""
        degrees = Degrees(tp=tp, cp=cp, dp=dp)
        parts = self._parts(dp, [1] * len(self.members), bool(by_memory))
        shape = joined_replicas(self.problem.cluster, degrees, {part.group: part.num_replicas for part in parts})
        shards, padding = shards_of(parts, degrees)[index]
        return group_costs(self.members[0].problem.price_list.model, shape, shards, zero, padding=padding)

    def _class_tables(self, index: int, shapes: Ints) -> list[ClassTable | None]:
        """Return the cost table of each row on one group; None where the model refuses the degrees or the share."""
        keys, where = unique_rows(shapes[:, [0, 1, 6, 7, NUM_DEGREES + index]])
        found = [self._class_table(index, *key) for key in keys.tolist()]
        return [found[place] for place in where.tolist()]

    def _class_table(self, index: int, tp: int, cp: int, sp: int, vocabulary: int, share: int) -> ClassTable | None:
        key = (index, tp, cp, sp, vocabulary, share)
        if key not in self._tables:
            prices = self.members[index].problem.price_list
            degrees = Degrees(tp=tp, cp=cp, sp=bool(sp), vocab_parallel=bool(vocabulary))
            if prices.model.split_legality(degrees, share) is not None:
                self._tables[key] = None
            elif self._is_measured:
                table = prices.model.shape_table(degrees, share)
                sizes = cut_bytes(prices.model.profile, table.output_bytes, share)
                self._tables[key] = class_table(table, prices.at, sizes)
            else:
                self._price_shares(index, degrees, key[:-1])
        return self._tables[key]

    @cached_property
    def _is_measured(self) -> bool:
        return any(layer.costs for layer in self.problem.profile.classes.values())

    def _price_shares(self, index: int, degrees: Degrees, key: tuple[int, ...]) -> None:
        """Note the tables of every share up to the largest microbatch at once; none where one layer alone never fits."""
        prices = self.members[index].problem.price_list
        shares = range(1, self.problem.job.space.max_microbatch + 1)
        table = prices.model.size_table(degrees, shares)
        cut = np.stack(
            [
                cut_bytes(prices.model.profile, output, share)
                for share, output in zip(shares, table.output_bytes, strict=True)
            ]
        )
        every = SizeTables(class_table(table, prices.at, cut), np.ones(len(shares), dtype=np.bool_))
        for place, share in enumerate(shares):
            columns = {name: getattr(every.table, name)[place] for name in ClassTable.__dataclass_fields__}
            fits = every.least_bytes[place] <= prices.most_bytes
            self._tables[*key, share] = ClassTable(**columns) if fits else None


Choices = GroupChoices | JoinedChoices


def choices_by_group(problem: Problem, pools: set[Pool]) -> dict[str, Choices]:
    """Return the choices of each node group, and of each joined pool, that is used."""
    names = sorted({name for pool in pools for name in pool.groups})
    found: dict[str, Choices] = {}
    alone = {name: GroupChoices.of(problem.profile, problem.cluster, problem.job, name) for name in names}
    found.update(alone)
    for pool in sorted(pools, key=lambda pool: pool.group):
        if pool.parts:
            found[pool.group] = JoinedChoices.of(problem, pool, tuple(alone[name] for name in pool.groups))
    return found
