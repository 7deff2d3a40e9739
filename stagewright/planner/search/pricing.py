"""The whole space priced at once: one row of arrays for each configuration, one column for each class of layers.

Layers of a model fall into few classes (equal blocks are one), and configurations share what they are made of: a cost
table depends on the degrees inside a replica and the microbatch, data-parallel traffic on the shape of the replica
group and the ZeRO stage. Both are computed once; a configuration's row is a gather and a few vector operations. The
numbers are those of `layer_costs`, which prices one configuration at a time.

n configurations, C classes: about 1 us a configuration beside the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.data_parallel import ReplicaTraffic, replica_traffic
from stagewright.planner.cost.groups import AxisOrder, GroupShape, Tier
from stagewright.planner.cost.layer_table import LayerTable
from stagewright.planner.cost.memory import ParameterBytes, state_bytes
from stagewright.planner.documents.cluster import NodeGroup
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import LayerRun, ModelProfile
from stagewright.planner.search.layer_costs import Configuration, cut_bytes
from stagewright.planner.search.order import Layout
from stagewright.planner.search.space import PIPELINE_INSIDE, PIPELINE_OUTSIDE, divisors

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

AXIS_ORDERS: tuple[AxisOrder, ...] = (PIPELINE_OUTSIDE, PIPELINE_INSIDE)
UNIT = 2.0**30
_LEAST_PRICED = 24  # tables that even a deadline long past leaves time for, so that something can be answered


@dataclass(frozen=True, eq=False)
class LayerClasses:
    """Which layers are alike in every configuration, and the runs of equal layers in model order.

    Parameters
    ----------
    of_layer : class of each layer, [L].
    first : a layer of each class, [C].
    run_class, run_length : class and length of each run, [K].
    """

    of_layer: Ints
    first: Ints
    run_class: Ints
    run_length: Ints

    @property
    def num_classes(self) -> int:
        return len(self.first)

    @property
    def num_runs(self) -> int:
        return len(self.run_class)

    @cached_property
    def run_start(self) -> Ints:
        """First layer of each run, and the number of layers, [K + 1]."""
        return np.concatenate((np.zeros(1, np.int32), np.cumsum(self.run_length, dtype=np.int32)))

    @cached_property
    def counts(self) -> Ints:
        """Layers of each class, [C]."""
        return np.bincount(self.of_layer, minlength=self.num_classes).astype(np.int32)


def classes_of(profile: ModelProfile) -> LayerClasses:
    """Return the classes of a model's layers: equal layer class, equal sources, equal ties, equal tensors alive at a cut.

    A layer's kept input is its sources' output, so the sources' classes belong to its own; layers inside a branch are
    told apart from equal ones outside by what crosses the cut before them.
    """
    names = profile.layer_classes
    sources: dict[int, list[int]] = {}
    for source, target in profile.edge_indices:
        sources.setdefault(target, []).append(source)
    tied = {layer for tie in profile.tied for layer in tie.layers}
    position = profile.layer_names
    told = [edge.bytes_per_sample for edge in profile.edges] if profile.edges is not None else []
    crossing: list[list[str]] = [[] for _ in range(len(names) + 1)]
    for index, (source, target) in enumerate(profile.edge_indices):
        size = told[index] if told else None
        for cut in range(source + 1, target + 1):
            crossing[cut].append(f"{names[source]}:{size}")
    keys = [
        (
            names[layer],
            tuple(sorted(names[source] for source in sources.get(layer, []))),
            position[layer] if position[layer] in tied else "",
            tuple(sorted(crossing[layer])) if profile.edges is not None else (),
        )
        for layer in range(len(names))
    ]
    known = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    of_layer = np.array([known[key] for key in keys], dtype=np.int32)
    first = np.array([keys.index(key) for key in known], dtype=np.int32)
    starts = np.flatnonzero(np.concatenate(([True], of_layer[1:] != of_layer[:-1])))
    lengths = np.diff(np.append(starts, len(of_layer))).astype(np.int32)
    return LayerClasses(of_layer, first, of_layer[starts], lengths)


def one_of_each(profile: ModelProfile, classes: LayerClasses) -> ModelProfile:
    """Return the chain with one layer of each run, which prices like the whole; the profile itself when it is a graph."""
    if profile.edges is not None and not (profile.is_chain and all(e.bytes_per_sample is None for e in profile.edges)):
        return profile
    runs = tuple(
        LayerRun(name=f"run.{index}", layer_class=profile.layer_classes[start])
        for index, start in enumerate(classes.run_start[:-1].tolist())
    )
    return ModelProfile(
        name=profile.name,
        dtype=profile.dtype,
        layers=runs,
        classes=profile.classes,
        architecture=profile.architecture,
    )


@dataclass(frozen=True, eq=False)
class ClassTable:
    """A cost table by class: [C], or [3, C] with the recomputation level first. `cut_bytes` is before a layer."""

    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    split_excess_s: Floats
    recompute_s: Floats
    kept_bytes: Floats
    late_bytes: Floats
    workspace_bytes: Floats
    split_workspace_bytes: Floats
    cut_bytes: Floats
    dense_parameters: Floats
    expert_parameters: Floats
    frozen_parameters: Floats
    optimizer_s: Floats


def class_table(table: LayerTable, at: Ints, cut: Floats) -> ClassTable:
    """Return the columns of the layers `at`, one of each class; `cut` [L + 1] is before each layer and behind the last.

    Where the table holds several microbatch sizes, they come first.
    """

    def by_level(rows: Floats) -> Floats:
        return np.asarray(np.moveaxis(rows[..., at], 0, -2))

    return ClassTable(
        table.forward_s[..., at],
        table.input_grad_s[..., at],
        table.weight_grad_s[..., at],
        table.split_excess_s[..., at],
        by_level(table.recompute_s),
        by_level(table.activation_bytes),
        by_level(table.late_bytes),
        by_level(table.workspace_bytes),
        by_level(table.split_workspace_bytes),
        cut[..., :-1][..., at],
        table.dense_parameters[..., at],
        table.expert_parameters[..., at],
        table.frozen_parameters[..., at],
        table.optimizer_s[..., at],
    )


@dataclass(frozen=True, eq=False)
class Priced:
    """n configurations; arrays are [n], [n, C] or [n, 3, C].

    Parameters
    ----------
    shape : int32 [n, 12], the columns of SHAPE.
    latency_s : once a step and stage.
    state_bytes : of one layer of each class.
    gradient_bytes : of its parameters on one device before ZeRO.
    step_s : reduction and optimizer of one layer of each class.
    """

    shape: Ints
    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    split_excess_s: Floats
    recompute_s: Floats
    kept_bytes: Floats
    late_bytes: Floats
    workspace_bytes: Floats
    split_workspace_bytes: Floats
    cut_bytes: Floats
    state_bytes: Floats
    gradient_bytes: Floats
    step_s: Floats
    latency_s: Floats

    def __len__(self) -> int:
        return len(self.shape)

    @cached_property
    def time_s(self) -> Floats:
        """Seconds of one layer's microbatch without recomputation, the backward in one piece, [n, C]."""
        return self.forward_s + self.input_grad_s + self.weight_grad_s

    def least_time_s(self, levels: Sequence[int]) -> Floats:
        """Return the same with the cheapest recomputation of some levels, [n, C]."""
        return np.asarray(self.time_s + self.recompute_s[:, list(levels)].min(axis=1))

    def take(self, rows: npt.NDArray[np.int64]) -> Priced:
        """Return some of the configurations, each array contiguous by row."""
        columns = (getattr(self, name)[rows] for name in self.__dataclass_fields__)
        return Priced(*(np.ascontiguousarray(column) for column in columns))

    def weight_grad_of(self, row: int | npt.NDArray[np.int64], layout: Layout) -> Floats:
        """Return the seconds of one layer's weight gradient under a schedule, [C], of several configurations [n, C]."""
        return np.asarray(self.weight_grad_s[row] + layout.split_share * self.split_excess_s[row])

    def workspace_of(self, *, defers: bool) -> Floats:
        """Return the highest temporary use, [n, 3, C]; `defers` where every backward is split."""
        return self.split_workspace_bytes if defers else self.workspace_bytes

    def configuration(self, row: int) -> Configuration:
        """Return one configuration as a record."""
        return configuration_of(self.shape[row])


SHAPE = (
    "tp",
    "cp",
    "dp",
    "pp",
    "ep",
    "etp",
    "sp",
    "vocab_parallel",
    "zero",
    "microbatch",
    "num_microbatches",
    "axis_order",
)
TP, CP, DP, PP, EP, ETP, SP, VOCAB, ZERO, MICROBATCH, NUM_MICROBATCHES, AXES = range(12)


def with_equal(shapes: Ints, equal: Sequence[tuple[str, str]]) -> Ints:
    """Return the rows whose columns of each pair are equal."""
    for first, second in equal:
        shapes = shapes[shapes[:, SHAPE.index(first)] == shapes[:, SHAPE.index(second)]]
    return shapes


def configuration_of(row: Sequence[int] | Ints) -> Configuration:
    """Return the configuration of a row of SHAPE columns."""
    return _configuration(tuple(np.asarray(row).tolist()))


@lru_cache(maxsize=4096)
def _configuration(row: tuple[int, ...]) -> Configuration:
    tp, cp, dp, pp, ep, etp, sp, vocabulary, zero, microbatch, count, axes = row
    degrees = Degrees(dp=dp, tp=tp, cp=cp, ep=ep, etp=etp, sp=bool(sp), vocab_parallel=bool(vocabulary), zero=zero)
    return Configuration(degrees, pp, microbatch, count, AXIS_ORDERS[axes])


@dataclass(frozen=True, eq=False)
class SizeTables:
    """The cost tables of one combination of degrees at M microbatch sizes, arrays [M, C] or [M, 3, C]; which are legal, [M]."""

    table: ClassTable
    legal: Bools

    @cached_property
    def least_bytes(self) -> Floats:
        """What the largest layer needs for one microbatch at its best level, [M]."""
        return np.asarray((self.table.kept_bytes + self.table.workspace_bytes).min(axis=1).max(axis=1))


@dataclass(eq=False)
class PriceList:
    """What configurations are made of, computed once: tables by inner shape, traffic and states by replica group.

    Parameters
    ----------
    model : cost model of the profile that `one_of_each` returns.
    at : the layer of each class there, [C].
    most_bytes : a microbatch of a shape where one layer alone needs more is left out.
    """

    model: CostModel
    at: Ints
    most_bytes: float
    _tables: dict[tuple[int, ...], SizeTables | None] = field(default_factory=dict)
    _groups: dict[tuple[int, ...], tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: CostModel, classes: LayerClasses, most_bytes: float) -> PriceList:
        """Return the empty list for a model."""
        small = one_of_each(model.profile, classes)
        at = classes.first
        if small is not model.profile:
            at = (np.searchsorted(classes.run_start, classes.first, side="right") - 1).astype(np.int32)
        return cls(CostModel(small, model.cluster, model.job, model.options, model.order), at, most_bytes)

    def limited(self, most_bytes: float) -> PriceList:
        """Return the list without the shapes where one layer needs more; what is priced is shared."""
        return PriceList(self.model, self.at, most_bytes, self._tables, self._groups)

    def without_limit(self) -> PriceList:
        """Return the list with the shapes that one layer overfills."""
        return self.limited(float("inf"))

    @cached_property
    def sizes(self) -> Ints:
        """Every microbatch of the space, ascending, [M]."""
        job = self.model.job
        return np.array([size for size in divisors(job.global_batch) if size <= job.space.max_microbatch], np.int32)

    def price(self, shapes: Ints) -> Priced:
        """Return the rows of all shapes that the cost model admits."""
        keys, table_of = unique_rows(_table_keys(shapes))
        tables = [self._size_tables(tuple(key)) for key in keys.tolist()]
        some = next((tables_of for tables_of in tables if tables_of is not None), None)
        if some is None:
            return no_rows(len(self.at))
        none = np.zeros(len(self.sizes), dtype=np.bool_)
        admitted = np.stack(
            [none if one is None else one.legal & (one.least_bytes <= self.most_bytes) for one in tables]
        )
        assert np.isin(shapes[:, MICROBATCH], self.sizes).all()
        size_of = np.searchsorted(self.sizes, shapes[:, MICROBATCH])
        legal = admitted[table_of, size_of]
        shapes, table_of, size_of = shapes[legal], table_of[legal], size_of[legal]
        if not len(shapes):
            return no_rows(len(self.at))
        stacked = {
            name: np.stack([getattr((one or some).table, name) for one in tables])[table_of, size_of]
            for name in ClassTable.__dataclass_fields__
        }
        dense = self._group_rows(shapes, expert=False)
        expert = self._group_rows(shapes, expert=True)
        return combined_rows(shapes, stacked, dense, expert, self.model)

    def priced_in_time(self, shapes: Ints, stop: Callable[[], bool]) -> Bools:
        """Price tables until `stop` says so; return of which shapes the tables are known then, bool [n].

        Those with fewest devices beside the tensor ranks come first, then many tensor ranks.
        """
        keys, table_of = unique_rows(_table_keys(shapes))
        tp, cp, least, ep, etp = keys[:, :5].T
        known = np.zeros(len(keys), dtype=np.bool_)
        for place in np.lexsort((-tp, least * cp * ep * etp)).tolist():
            key = tuple(keys[place].tolist())
            if key not in self._tables and len(self._tables) >= _LEAST_PRICED and stop():
                break
            self._size_tables(key)
            known[place] = True
        return np.asarray(known[table_of])

    def _size_tables(self, key: tuple[int, ...]) -> SizeTables | None:
        """Return the tables of a combination of degrees; None when no size is legal."""
        if key not in self._tables:
            self._tables[key] = self._make_tables(key)
        return self._tables[key]

    def _make_tables(self, key: tuple[int, ...]) -> SizeTables | None:
        tp, cp, dp, ep, etp, sp, vocabulary = key
        degrees = Degrees(dp=dp, tp=tp, cp=cp, ep=ep, etp=etp, sp=bool(sp), vocab_parallel=bool(vocabulary))
        model, sizes = self.model, self.sizes.tolist()
        if any(layer.costs for layer in model.profile.classes.values()):
            legal = np.array([model.legality(degrees, size) is None for size in sizes])
            if not legal.any():
                return None
            first = sizes[int(np.argmax(legal))]
            of_size = [
                self._class_table(degrees, size if is_legal else first)
                for size, is_legal in zip(sizes, legal, strict=True)
            ]
            columns = {
                name: np.stack([getattr(table, name) for table in of_size]) for name in ClassTable.__dataclass_fields__
            }
            return SizeTables(ClassTable(**columns), legal)
        # Beside the batch, whatever makes a size illegal makes all of them.
        legal = model.job.global_batch % (dp * self.sizes) == 0
        if not legal.any() or model.legality(degrees, sizes[int(np.argmax(legal))]) is not None:
            return None
        table = model.size_table(degrees, sizes)
        cut = np.stack(
            [cut_bytes(model.profile, output, size) for output, size in zip(table.output_bytes, sizes, strict=True)]
        )
        return SizeTables(class_table(table, self.at, cut), legal)

    def _class_table(self, degrees: Degrees, microbatch: int) -> ClassTable:
        table = self.model.table(degrees, microbatch)
        return class_table(table, self.at, cut_bytes(self.model.profile, table.output_bytes, microbatch))

    def _group_rows(self, shapes: Ints, *, expert: bool) -> Floats:
        """Return forward, backward, tail, latency, states and divisor columns, [n, 6]."""
        keys, where = unique_rows(_group_keys(shapes, expert=expert))
        return np.array([self._group(tuple(key)) for key in keys.tolist()])[where]

    def _group(self, key: tuple[int, ...]) -> tuple[float, ...]:
        if key not in self._groups:
            inner, count, outer_stride, outer_count, shards, zero = key
            group = self.model.cluster.groups[0]
            shape = (
                strided_shape(count, inner, group)
                if outer_count == 1
                else shape_of(
                    (np.arange(count)[None, :] * inner + np.arange(outer_count)[:, None] * outer_stride).ravel(), group
                )
            )
            self._groups[key] = group_costs(self.model, shape, shards, zero)
        return self._groups[key]


def unique_rows(rows: Ints) -> tuple[Ints, npt.NDArray[np.int64]]:
    """Return the different rows in ascending order and which of them each row is: `np.unique` of rows, column by column."""
    of_row = np.zeros(len(rows), dtype=np.int64)
    first = np.zeros(min(len(rows), 1), dtype=np.int64)
    for column in rows.T.astype(np.int64):
        low = column.min(initial=0)
        packed = of_row * (column.max(initial=0) - low + 1) + column - low
        _, first, of_row = np.unique(packed, return_index=True, return_inverse=True)
    return rows[first], of_row


def group_costs(
    model: CostModel, shape: GroupShape, num_replicas: float, zero: int, *, padding: float = 1.0
) -> tuple[float, ...]:
    """Return what one parameter's replicas cost: seconds for UNIT parameters, latency, bytes and divisor for one.

    `padding` is the largest shard over the mean one.
    """
    optimizer, options = model.job.optimizer, model.options

    def traffic(one: float) -> ReplicaTraffic:
        parameters = one * (padding if zero else 1.0)
        return replica_traffic(
            parameters * optimizer.gradient_bytes,
            parameters * optimizer.parameter_bytes,
            shape,
            zero=zero,
            shard_size=options.sharding_group,
            accumulate=options.accumulate_sharded,
            gather_once=options.gather_once,
            update_bytes=parameters * optimizer.gathered_bytes,
        )

    whole = traffic(UNIT)
    shards = num_replicas if options.sharding_group is None else min(num_replicas, options.sharding_group)
    states = state_bytes(1.0, zero=zero, num_shards=shards, sizes=ParameterBytes.of(optimizer))
    divisor = float(shards if zero else 1)
    return (whole.forward_s, whole.backward_s, whole.tail_s, traffic(1.0).tail_s, states.total, divisor)


def strided_shape(size: int, stride: int, group: NodeGroup) -> GroupShape:
    """Return the shape of `size` devices at distance `stride`: `groups.strided_group` without listing them."""
    tiers: list[Tier] = []
    left, distance = size, stride
    for level in group.links:
        if distance >= level.num_devices or left == 1:
            continue
        if level.num_devices % distance:
            return shape_of(np.arange(size) * stride, group)
        inside = level.num_devices // distance
        if min(left, inside) > 1:
            tiers.append(Tier(min(left, inside), level))
        left, distance = -(-left // inside), level.num_devices
    return GroupShape(tuple(tiers))


def shape_of(devices: npt.NDArray[np.int64], group: NodeGroup) -> GroupShape:
    """Return the shape of any devices of a group: `groups.group_of_ranks` on arrays."""
    tiers: list[Tier] = []
    units = np.unique(devices)
    for level in group.links:
        instances, members = np.unique(units // level.num_devices, return_counts=True)
        if members.max() > 1:
            tiers.append(Tier(int(members.max()), level))
        units = instances * level.num_devices
        if len(units) == 1:
            break
    return GroupShape(tuple(tiers))


def _table_keys(shapes: Ints) -> Ints:
    """Return the columns a table depends on beside the microbatch; dp is the least that the expert groups need."""
    inner = shapes[:, TP] * shapes[:, CP]
    experts = shapes[:, EP] * shapes[:, ETP]
    least = np.minimum(shapes[:, DP], np.maximum(1, experts // np.gcd(experts, inner)))
    columns = [shapes[:, TP], shapes[:, CP], least]
    columns += [shapes[:, column] for column in (EP, ETP, SP, VOCAB)]
    return np.stack(columns, axis=1)


def _group_keys(shapes: Ints, *, expert: bool) -> Ints:
    """Return (stride, size, outer stride, outer size, shards, ZeRO stage) of the devices that share a weight.

    Replicas of dense weights are the cp x dp devices at distance tp, of routed experts every (ep * etp)-th device. With
    the pipeline inside, dp steps over whole pipelines: the group is then a grid. Shards are those of `memory.expert_shards`.
    """
    tp, cp, dp, pp = shapes[:, TP], shapes[:, CP], shapes[:, DP], shapes[:, PP]
    inner = shapes[:, EP] * shapes[:, ETP] if expert else tp
    unit = tp * cp
    grid = (shapes[:, AXES] == 1) & (pp > 1) & (dp > 1)
    crosses = inner > unit  # experts that span several data-parallel members step over pipelines at once
    ones = np.ones_like(tp)
    stride = np.where(grid & crosses, inner * pp, inner)
    size = np.where(grid, np.where(crosses, unit * dp // inner, unit // np.minimum(inner, unit)), unit * dp // inner)
    outer_stride = np.where(grid & ~crosses, unit * pp, ones)
    outer_size = np.where(grid & ~crosses, dp, ones)
    shards = np.where(inner == 1, cp * dp, unit * dp // inner)
    return np.stack([stride, size, outer_stride, outer_size, shards, shapes[:, ZERO]], axis=1)


def combined_rows(shapes: Ints, table: dict[str, Floats], dense: Floats, expert: Floats, model: CostModel) -> Priced:
    """Return the rows from tables [n, C] and group columns [n, 6]; the formulas of `CostModel.replica_table`."""
    dense_share, expert_share = table["dense_parameters"] / UNIT, table["expert_parameters"] / UNIT

    def each(column: int) -> Floats:
        return np.asarray(dense_share * dense[:, column, None] + expert_share * expert[:, column, None])

    forward_extra, backward_extra = each(0), each(1)
    if model.options.prefetch:
        forward_extra = np.maximum(0.0, forward_extra - table["forward_s"])
        backward_extra = np.maximum(0.0, backward_extra - table["input_grad_s"] - table["weight_grad_s"])
    parameters = table["dense_parameters"] + table["expert_parameters"]
    owned = table["dense_parameters"] / dense[:, 5, None] + table["expert_parameters"] / expert[:, 5, None]
    optimizer = table["optimizer_s"] * owned / np.maximum(parameters, 1.0)
    workspace, split_workspace = table["workspace_bytes"], table["split_workspace_bytes"]
    gathered = parameters * model.job.optimizer.parameter_bytes
    sharded = shapes[:, ZERO] == 3
    if sharded.any():
        most = np.where(sharded[:, None], gathered + gathered.max(axis=1, keepdims=True), 0.0)[:, None, :]
        workspace, split_workspace = workspace + most, split_workspace + most
    return Priced(
        shape=shapes,
        forward_s=table["forward_s"] + forward_extra,
        input_grad_s=table["input_grad_s"],
        weight_grad_s=table["weight_grad_s"] + backward_extra,
        split_excess_s=table["split_excess_s"],
        recompute_s=table["recompute_s"],
        kept_bytes=table["kept_bytes"],
        late_bytes=table["late_bytes"],
        workspace_bytes=workspace,
        split_workspace_bytes=split_workspace,
        cut_bytes=table["cut_bytes"],
        state_bytes=table["dense_parameters"] * dense[:, 4, None]
        + table["expert_parameters"] * expert[:, 4, None]
        + table["frozen_parameters"] * model.job.optimizer.parameter_bytes,
        gradient_bytes=parameters * model.job.optimizer.gradient_bytes,
        step_s=each(2) + optimizer,
        latency_s=dense[:, 3],
    )


def no_rows(num_classes: int) -> Priced:
    flat, tall = np.zeros((0, num_classes)), np.zeros((0, 3, num_classes))
    return Priced(
        np.zeros((0, len(SHAPE)), np.int32),
        flat,
        flat,
        flat,
        flat,
        tall,
        tall,
        tall,
        tall,
        tall,
        flat,
        flat,
        flat,
        flat,
        np.zeros(0),
    )
