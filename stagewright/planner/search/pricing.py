"""The whole space priced at once: one row of arrays for each configuration, one column for each class of layers.

Layers of a model fall into few classes (equal blocks are one), and configurations share what they are made of: a cost
table depends on the degrees inside a replica and the microbatch, data-parallel traffic on the shape of the replica
group and the ZeRO stage. Both are computed once; a configuration's row is a gather and a few vector operations. The
numbers are those of `layer_costs`, which prices one configuration at a time.

n configurations, C classes: about 1 us a configuration beside the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.groups import AxisOrder
from stagewright.planner.cost.layer_table import LayerTable
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.search.layer_costs import Configuration, cut_bytes
from stagewright.planner.search.space import PIPELINE_INSIDE, PIPELINE_OUTSIDE

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

AXIS_ORDERS: tuple[AxisOrder, ...] = (PIPELINE_OUTSIDE, PIPELINE_INSIDE)
UNIT = 2.0**30


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


@dataclass(frozen=True, eq=False)
class ClassTable:
    """A cost table by class: [C], or [3, C] with the recomputation level first. `cut_bytes` is before a layer."""

    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    recompute_s: Floats
    kept_bytes: Floats
    freed_share: Floats
    workspace_bytes: Floats
    cut_bytes: Floats
    dense_parameters: Floats
    expert_parameters: Floats
    optimizer_s: Floats


def class_table(table: LayerTable, classes: LayerClasses, cut: Floats) -> ClassTable:
    """Return the columns of one layer of each class."""
    at = classes.first
    return ClassTable(
        table.forward_s[at],
        table.input_grad_s[at],
        table.weight_grad_s[at],
        table.recompute_s[:, at],
        table.activation_bytes[:, at],
        table.freed_at_input_grad[:, at],
        table.workspace_bytes[:, at],
        cut[:-1][at],
        table.dense_parameters[at],
        table.expert_parameters[at],
        table.optimizer_s[at],
    )


@dataclass(frozen=True, eq=False)
class Priced:
    """n configurations; arrays are [n], [n, C] or [n, 3, C].

    Parameters
    ----------
    shape : int32 [n, 12], the columns of SHAPE.
    latency_s : once a step and stage.
    state_bytes : of one layer of each class.
    step_s : reduction and optimizer of one layer of each class.
    """

    shape: Ints
    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    recompute_s: Floats
    kept_bytes: Floats
    freed_share: Floats
    workspace_bytes: Floats
    cut_bytes: Floats
    state_bytes: Floats
    step_s: Floats
    latency_s: Floats

    def __len__(self) -> int:
        return len(self.shape)

    def take(self, rows: npt.NDArray[np.int64]) -> Priced:
        """Return some of the configurations."""
        return Priced(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

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


def configuration_of(row: Sequence[int] | Ints) -> Configuration:
    """Return the configuration of a row of SHAPE columns."""
    tp, cp, dp, pp, ep, etp, sp, vocabulary, zero, microbatch, count, axes = (int(value) for value in row)
    degrees = Degrees(dp=dp, tp=tp, cp=cp, ep=ep, etp=etp, sp=bool(sp), vocab_parallel=bool(vocabulary), zero=zero)
    return Configuration(degrees, pp, microbatch, count, AXIS_ORDERS[axes])


@dataclass(eq=False)
class PriceList:
    """What configurations are made of, computed once: tables by inner shape, traffic and states by replica group."""

    models: Sequence[CostModel]
    classes: LayerClasses
    _tables: dict[tuple[int, ...], ClassTable | None] = field(default_factory=dict)
    _traffic: dict[tuple[int, ...], tuple[float, ...]] = field(default_factory=dict)
    _cuts: dict[int, Floats] = field(default_factory=dict)

    def price(self, shapes: Ints) -> Priced:
        """Return the rows of all shapes that the cost model admits."""
        keys, table_of = np.unique(_table_keys(shapes), axis=0, return_inverse=True)
        tables = [self.table(tuple(key)) for key in keys.tolist()]
        legal = np.array([table is not None for table in tables], dtype=bool)[np.ravel(table_of)]
        shapes, table_of = shapes[legal], np.ravel(table_of)[legal]
        found = list(tables)
        empty = next((table for table in found if table is not None), None)
        if empty is None or not len(shapes):
            return _no_rows(self.classes.num_classes)
        stacked = {
            name: np.stack([getattr(table if table is not None else empty, name) for table in found])[table_of]
            for name in ClassTable.__dataclass_fields__
        }
        dense = self._group_rows(shapes, expert=False)
        expert = self._group_rows(shapes, expert=True)
        return _combine(shapes, stacked, dense, expert, self.models[0])

    def table(self, key: tuple[int, ...]) -> ClassTable | None:
        """Return the cost table of an inner shape by class; None when the cost model refuses it."""
        if key not in self._tables:
            self._tables[key] = self._make_table(key)
        return self._tables[key]

    def _make_table(self, key: tuple[int, ...]) -> ClassTable | None:
        tp, cp, dp, _pp, ep, etp, sp, vocabulary, microbatch, axes = key
        degrees = Degrees(dp=dp, tp=tp, cp=cp, ep=ep, etp=etp, sp=bool(sp), vocab_parallel=bool(vocabulary))
        model = self.models[axes]
        if model.legality(degrees, microbatch) is not None:
            return None
        table = model.table(degrees, microbatch)
        return class_table(table, self.classes, cut_bytes(model.profile, table.output_bytes, microbatch))

    def _group_rows(self, shapes: Ints, *, expert: bool) -> Floats:
        """Return forward, backward, tail, latency, parameter, gradient, optimizer and divisor columns, [n, 8]."""
        keys, where = np.unique(_group_keys(shapes, expert=expert), axis=0, return_inverse=True)
        rows = np.array([self._group(tuple(key), expert=expert) for key in keys.tolist()])
        return rows[np.ravel(where)]

    def _group(self, key: tuple[int, ...], *, expert: bool) -> tuple[float, ...]:
        known = (int(expert), *key)
        if known not in self._traffic:
            tp, cp, dp, pp, ep, etp, zero, axes = key
            degrees = Degrees(dp=dp, tp=tp, cp=cp, ep=ep, etp=etp, zero=zero)
            self._traffic[known] = _group_costs(self.models[axes], degrees, pp, expert=expert)
        return self._traffic[known]


def _group_costs(model: CostModel, degrees: Degrees, num_ranks: int, *, expert: bool) -> tuple[float, ...]:
    def traffic(parameters: float) -> tuple[float, float, float]:
        dense, routed = (0.0, parameters) if expert else (parameters, 0.0)
        found = model.traffic(dense, routed, degrees, num_pipeline_ranks=num_ranks)
        return found.forward_s, found.backward_s, found.tail_s

    forward_s, backward_s, tail_s = traffic(UNIT)
    latency_s = traffic(1.0)[2]
    states = model.states(0.0, 1.0, degrees) if expert else model.states(1.0, 0.0, degrees)
    replicas = degrees.num_devices // (degrees.ep * degrees.etp) if expert else degrees.dp * degrees.cp
    shard = model.options.sharding_group
    divisor = 1 if degrees.zero == 0 else replicas if shard is None else min(replicas, shard)
    return (forward_s, backward_s, tail_s, latency_s, states.total, float(divisor))


def _table_keys(shapes: Ints) -> Ints:
    """Return the columns a table depends on: dp is the least that the expert groups need, pp only where they cross it."""
    tp, cp, dp, pp = shapes[:, TP], shapes[:, CP], shapes[:, DP], shapes[:, PP]
    experts = shapes[:, EP] * shapes[:, ETP]
    inner = tp * cp
    least = np.maximum(1, experts // np.gcd(experts, inner))
    inside = (shapes[:, AXES] == 1) & (least > 1)
    return np.stack(
        [
            tp,
            cp,
            np.minimum(least, dp),
            np.where(inside, pp, 1),
            shapes[:, EP],
            shapes[:, ETP],
            shapes[:, SP],
            shapes[:, VOCAB],
            shapes[:, MICROBATCH],
            np.where(inside, 1, 0),
        ],
        axis=1,
    )


def _group_keys(shapes: Ints, *, expert: bool) -> Ints:
    """Return the columns that replica groups depend on, brought to one form for equal groups."""
    tp, cp, dp, pp = shapes[:, TP], shapes[:, CP], shapes[:, DP], shapes[:, PP]
    inside = (shapes[:, AXES] == 1) & (pp > 1) & (dp > 1)
    ranks = np.where(inside, pp, 1)
    if expert:
        columns = [tp, cp, dp, ranks, shapes[:, EP], shapes[:, ETP], shapes[:, ZERO], inside.astype(np.int32)]
    else:
        one = np.ones_like(tp)
        joined = ~inside
        columns = [
            tp,
            np.where(joined, 1, cp),
            np.where(joined, cp * dp, dp),
            ranks,
            one,
            one,
            shapes[:, ZERO],
            inside.astype(np.int32),
        ]
    return np.stack(columns, axis=1)


def _combine(shapes: Ints, table: dict[str, Floats], dense: Floats, expert: Floats, model: CostModel) -> Priced:
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
    workspace = table["workspace_bytes"]
    gathered = parameters * model.job.optimizer.parameter_bytes
    sharded = shapes[:, ZERO] == 3
    if sharded.any():
        most = gathered + gathered.max(axis=1, keepdims=True)
        workspace = workspace + np.where(sharded[:, None, None], most[:, None, :], 0.0)
    return Priced(
        shape=shapes,
        forward_s=table["forward_s"] + forward_extra,
        input_grad_s=table["input_grad_s"],
        weight_grad_s=table["weight_grad_s"] + backward_extra,
        recompute_s=table["recompute_s"],
        kept_bytes=table["kept_bytes"],
        freed_share=table["freed_share"],
        workspace_bytes=workspace,
        cut_bytes=table["cut_bytes"],
        state_bytes=table["dense_parameters"] * dense[:, 4, None] + table["expert_parameters"] * expert[:, 4, None],
        step_s=each(2) + optimizer,
        latency_s=dense[:, 3],
    )


def _no_rows(num_classes: int) -> Priced:
    flat, tall = np.zeros((0, num_classes)), np.zeros((0, 3, num_classes))
    return Priced(
        np.zeros((0, len(SHAPE)), np.int32), flat, flat, flat, tall, tall, tall, tall, flat, flat, flat, np.zeros(0)
    )
