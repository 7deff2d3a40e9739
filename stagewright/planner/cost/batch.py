"""Step seconds and peak bytes of many configurations at once: `step_time`'s closed forms over arrays.

Configurations share what they are made of. A cost table depends on the degrees inside a replica and the microbatch, the
data-parallel coefficients on the shape of the replica groups and the ZeRO stage, a hop on the distance of two pipeline
ranks. Each distinct one is priced once by the scalar code; a compiled loop then goes through the rows. n rows, C layer
classes: O(n C), about 0.3 us a row; the results equal the scalar path's to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.cost.cost_model import UNIT, CostModel
from stagewright.planner.cost.layer_table import LEVELS
from stagewright.planner.cost.step_time import FAMILIES, SPLIT_FAMILIES, Choice, hop_seconds, layer_roles
from stagewright.planner.documents.plan import Degrees

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Columns of the per-class table.
_FORWARD, _INPUT, _WEIGHT, _RECOMPUTE, _KEPT, _WORKSPACE = 0, 1, 2, 3, 6, 9
_HELD, _DENSE, _EXPERT, _OPTIMIZER, _OUTPUT, _FROZEN, _EXCESS, _COLUMNS = 12, 15, 16, 17, 18, 19, 20, 21

_IS_SPLIT = np.array([family in SPLIT_FAMILIES for family in FAMILIES])


@dataclass(frozen=True, eq=False)
class Choices:
    """n configurations, one array for each part; `family` and `recompute` are indices of FAMILIES and LEVELS."""

    dp: Ints
    tp: Ints
    cp: Ints
    ep: Ints
    etp: Ints
    ulysses: Ints
    sp: Ints
    vocab_parallel: Ints
    zero: Ints
    num_ranks: Ints
    num_chunks: Ints
    microbatch: Ints
    family: Ints
    recompute: Ints

    def __len__(self) -> int:
        return len(self.dp)

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> Choices:
        """Return the arrays of some configurations."""
        rows = [
            (
                choice.degrees.dp,
                choice.degrees.tp,
                choice.degrees.cp,
                choice.degrees.ep,
                choice.degrees.etp,
                choice.degrees.ulysses,
                int(choice.degrees.sp),
                int(choice.degrees.vocab_parallel),
                choice.degrees.zero,
                choice.num_ranks,
                choice.num_chunks,
                choice.microbatch,
                FAMILIES.index(choice.family),
                LEVELS.index(choice.recompute),
            )
            for choice in choices
        ]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, len(fields(cls))).T.copy())

    def choice(self, row: int) -> Choice:
        """Return one configuration as a record."""
        return Choice(
            self.degrees(row),
            int(self.num_ranks[row]),
            int(self.num_chunks[row]),
            int(self.microbatch[row]),
            FAMILIES[int(self.family[row])],
            LEVELS[int(self.recompute[row])],
        )

    def degrees(self, row: int) -> Degrees:
        """Return the degrees of one configuration."""
        return Degrees(
            dp=int(self.dp[row]),
            tp=int(self.tp[row]),
            cp=int(self.cp[row]),
            ep=int(self.ep[row]),
            etp=int(self.etp[row]),
            ulysses=int(self.ulysses[row]),
            sp=bool(self.sp[row]),
            vocab_parallel=bool(self.vocab_parallel[row]),
            zero=int(self.zero[row]),
        )


@dataclass(frozen=True, eq=False)
class Estimates:
    """Step seconds and peak bytes of n configurations; NaN where the model cannot be split so."""

    step_s: Floats
    peak_bytes: Floats


def estimate_all(model: CostModel, choices: Choices) -> Estimates:
    """Return the closed forms of all configurations."""
    count = len(choices)
    if count == 0:
        return Estimates(np.zeros(0), np.zeros(0))
    classes = _layer_classes(model)
    inner = choices.tp * choices.cp
    least_dp = np.maximum(1, -(-choices.ep * choices.etp // inner))
    shape_parts = (
        choices.tp,
        choices.cp,
        choices.ep,
        choices.etp,
        choices.ulysses,
        choices.sp,
        choices.vocab_parallel,
        choices.microbatch,
        least_dp,
    )
    shape_rows, shape = _distinct(shape_parts)
    tables, roles, counts = _tables(model, choices, shape_rows, classes)
    dense_rows, dense = _distinct((choices.tp, choices.cp * choices.dp, choices.zero))
    expert_rows, expert = _distinct((choices.tp, inner * choices.dp, choices.ep, choices.etp, choices.zero))
    hop_rows, hop = _distinct((choices.tp, inner * choices.dp, choices.sp, choices.num_ranks))
    coefficients = np.array([_replica_row(model, choices.degrees(row), expert=False) for row in dense_rows])
    expert_coefficients = np.array([_replica_row(model, choices.degrees(row), expert=True) for row in expert_rows])
    hops = np.array([_hop_row(model, choices.degrees(row), int(choices.num_ranks[row])) for row in hop_rows])
    step_s, peak_bytes = np.empty(count), np.empty(count)
    _evaluate(
        tables,
        roles,
        counts,
        shape,
        coefficients,
        dense,
        expert_coefficients,
        expert,
        hops,
        hop,
        np.stack(
            (choices.dp, choices.num_ranks, choices.num_chunks, choices.microbatch, choices.family, choices.recompute)
        ),
        model.job.global_batch,
        model.base_bytes,
        model.options.prefetch,
        step_s,
        peak_bytes,
    )
    too_many = inner * choices.dp * choices.num_ranks > model.cluster.num_devices
    uneven = model.job.global_batch % (choices.dp * choices.microbatch) != 0
    refused = too_many | uneven
    step_s[refused] = np.nan
    peak_bytes[refused] = np.nan
    return Estimates(step_s, peak_bytes)


def _distinct(parts: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Return the first row of each distinct combination, and the number of each row's combination."""
    key = np.zeros(len(parts[0]), dtype=np.int64)
    for part in parts:
        key *= int(part.max()) + 1
        key += part
    where = np.empty(len(key), dtype=np.int64)
    first = _number_keys(key, where)
    return first, where


@njit(cache=True)
def _number_keys(keys: Ints, where: Ints) -> Ints:
    """Fill the number of each key in the order of first appearance, and return the first rows: open addressing."""
    size = 1024
    slots = np.full(size, -1, dtype=np.int64)
    first = np.empty(size, dtype=np.int64)
    count = 0
    for row in range(len(keys)):
        if 2 * (count + 1) > size:
            size *= 4
            slots = np.full(size, -1, dtype=np.int64)
            for index in range(count):
                slot = _slot(keys[first[index]], size)
                while slots[slot] >= 0:
                    slot = (slot + 1) & (size - 1)
                slots[slot] = index
            grown = np.empty(size, dtype=np.int64)
            grown[:count] = first[:count]
            first = grown
        slot = _slot(keys[row], size)
        while slots[slot] >= 0 and keys[first[slots[slot]]] != keys[row]:
            slot = (slot + 1) & (size - 1)
        if slots[slot] < 0:
            slots[slot] = count
            first[count] = row
            count += 1
        where[row] = slots[slot]
    return first[:count].copy()


@njit(cache=True, no_cpython_wrapper=True)
def _slot(key: int, size: int) -> int:
    mixed = key ^ (key >> 31)
    mixed = (mixed * 0x9E3779B97F4A7C1) & 0x7FFFFFFFFFFFFFFF
    return (mixed >> 20) & (size - 1)


@dataclass(frozen=True, eq=False)
class _LayerClasses:
    """A layer of each kind of row in the tables, how many there are, and where they stand."""

    first: Ints
    counts: Floats
    roles: npt.NDArray[np.int8]


def _layer_classes(model: CostModel) -> _LayerClasses:
    """Return layers that cost the same in every configuration: same class, same place, same input."""
    profile, roles = model.profile, layer_roles(model)
    sources: dict[int, list[str]] = {}
    for source, target in profile.edge_indices:
        sources.setdefault(target, []).append(profile.layer_classes[source])
    keys = [
        (name, int(role), tuple(sorted(sources.get(layer, []))))
        for layer, (name, role) in enumerate(zip(profile.layer_classes, roles, strict=True))
    ]
    distinct = list(dict.fromkeys(keys))
    return _LayerClasses(
        np.array([keys.index(key) for key in distinct], dtype=np.int64),
        np.array([float(keys.count(key)) for key in distinct]),
        np.array([key[1] for key in distinct], dtype=np.int8),
    )


def _tables(
    model: CostModel, choices: Choices, rows: Ints, classes: _LayerClasses
) -> tuple[Floats, npt.NDArray[np.int8], Floats]:
    """Return [shapes, classes, columns]; NaN for a shape that the model refuses."""
    found = np.full((len(rows), len(classes.first), _COLUMNS), np.nan)
    at = classes.first
    for index, row in enumerate(rows):
        degrees = choices.degrees(int(row)).model_copy(update={"zero": 0})
        microbatch = int(choices.microbatch[row])
        if model.split_legality(degrees, microbatch) is not None:
            continue
        table = model.shape_table(degrees, microbatch)
        found[index, :, _FORWARD] = table.forward_s[at]
        found[index, :, _INPUT] = table.input_grad_s[at]
        found[index, :, _WEIGHT] = table.weight_grad_s[at]
        found[index, :, _EXCESS] = table.split_excess_s[at]
        found[index, :, _RECOMPUTE : _RECOMPUTE + 3] = table.recompute_s[:, at].T
        found[index, :, _KEPT : _KEPT + 3] = table.activation_bytes[:, at].T
        found[index, :, _WORKSPACE : _WORKSPACE + 3] = table.workspace_bytes[:, at].T
        found[index, :, _HELD : _HELD + 3] = np.maximum(table.activation_bytes, table.late_bytes)[:, at].T
        found[index, :, _DENSE] = table.dense_parameters[at]
        found[index, :, _EXPERT] = table.expert_parameters[at]
        found[index, :, _OPTIMIZER] = table.optimizer_s[at]
        found[index, :, _OUTPUT] = table.output_bytes[at]
        found[index, :, _FROZEN] = table.frozen_parameters[at] * model.job.optimizer.parameter_bytes
    return found, classes.roles, classes.counts


def _replica_row(model: CostModel, degrees: Degrees, *, expert: bool) -> tuple[float, ...]:
    """Return seconds forward, backward and at the end, bytes of state, and the optimizer's divisor, each a parameter;
    and the latency at the end."""
    unit = (0.0, UNIT) if expert else (UNIT, 0.0)
    one = (0.0, 1.0) if expert else (1.0, 0.0)
    traffic = model.traffic(*unit, degrees)
    divisor = model.state_divisors(degrees)[1 if expert else 0]
    return (
        traffic.forward_s / UNIT,
        traffic.backward_s / UNIT,
        traffic.tail_s / UNIT,
        model.states(*one, degrees).total,
        1.0 / divisor,
        0.0 if expert else model.traffic(1.0, 0.0, degrees).tail_s,
    )


def _hop_row(model: CostModel, degrees: Degrees, num_ranks: int) -> tuple[float, float]:
    """Return latency and seconds a byte of one hop."""
    latency_s = hop_seconds(model, degrees, num_ranks, 0.0)
    reference = 2.0**20
    return latency_s, (hop_seconds(model, degrees, num_ranks, reference) - latency_s) / reference


# Items summed over the layers of each role.
_F, _I, _W, _TAIL, _KEEP, _STATE, _ITEMS = range(7)


@njit(cache=True)
def _evaluate(
    tables: Floats,
    roles: npt.NDArray[np.int8],
    counts: Floats,
    shape: Ints,
    dense: Floats,
    dense_of: Ints,
    expert: Floats,
    expert_of: Ints,
    hops: Floats,
    hop_of: Ints,
    rows: Ints,
    batch: int,
    base: float,
    prefetch: bool,
    step: Floats,
    peak: Floats,
) -> None:
    """Fill step seconds and peak bytes of every row; the formulas of step_time."""
    sums = np.zeros((3, _ITEMS))
    work = np.zeros(3)
    for row in range(len(step)):
        d, v = rows[1, row], rows[2, row]
        count = batch // max(1, rows[0, row] * rows[3, row])
        family, level = rows[4, row], rows[5, row]
        _sum_layers(
            tables[shape[row]],
            roles,
            counts,
            dense[dense_of[row]],
            expert[expert_of[row]],
            d,
            level,
            _IS_SPLIT[family],
            prefetch,
            sums,
            work,
        )
        latency = dense[dense_of[row], 5]
        live_first, live_last = _live(family, d, count, v)
        before, inner, behind = sums[0], sums[1], sums[2]
        if d == 1:
            whole = before + inner + behind
            step[row] = count * (whole[_F] + whole[_I] + whole[_W]) + whole[_TAIL] + latency
            peak[row] = whole[_STATE] + live_first * whole[_KEEP] + max(work[1], max(work[0], work[2])) + base
            continue
        boundary = 0.0
        for index in range(len(counts)):
            if roles[index] == 1:
                boundary = max(boundary, tables[shape[row], index, _OUTPUT])
        hop = hops[hop_of[row], 0] + hops[hop_of[row], 1] * boundary
        pipeline = _pipeline(before, inner, behind, family, d, count, v, hop)
        step[row] = pipeline + inner[_TAIL] + max(before[_TAIL], behind[_TAIL]) + latency
        first = inner[_STATE] + before[_STATE] + live_first * (inner[_KEEP] + before[_KEEP]) + max(work[1], work[0])
        last = inner[_STATE] + behind[_STATE] + live_last * (inner[_KEEP] + behind[_KEEP]) + max(work[1], work[2])
        peak[row] = max(first, last) + base


@njit(cache=True, no_cpython_wrapper=True)
def _sum_layers(
    table: Floats,
    roles: npt.NDArray[np.int8],
    counts: Floats,
    dense: Floats,
    expert: Floats,
    num_ranks: int,
    level: int,
    is_split: bool,
    prefetch: bool,
    sums: Floats,
    work: Floats,
) -> None:
    """Fill the sums of each role and its largest workspace; blocks are divided over the ranks."""
    sums[:] = 0.0
    work[:] = 0.0
    held = (_HELD if is_split else _KEPT) + level
    for index in range(len(counts)):
        cost = table[index]
        role = roles[index]
        number = counts[index] / num_ranks if role == 1 else counts[index]
        gathered = cost[_DENSE] * dense[0] + cost[_EXPERT] * expert[0]
        reduced = cost[_DENSE] * dense[1] + cost[_EXPERT] * expert[1]
        if prefetch:
            gathered = max(0.0, gathered - cost[_FORWARD])
            reduced = max(0.0, reduced - cost[_INPUT] - cost[_WEIGHT])
        owned = (cost[_DENSE] * dense[4] + cost[_EXPERT] * expert[4]) / max(cost[_DENSE] + cost[_EXPERT], 1.0)
        sums[role, _F] += number * (cost[_FORWARD] + gathered)
        sums[role, _I] += number * (cost[_INPUT] + cost[_RECOMPUTE + level])
        sums[role, _W] += number * (cost[_WEIGHT] + reduced + (cost[_EXCESS] if is_split else 0.0))
        tail = cost[_DENSE] * dense[2] + cost[_EXPERT] * expert[2] + cost[_OPTIMIZER] * owned
        sums[role, _TAIL] += number * tail
        sums[role, _KEEP] += number * cost[held]
        sums[role, _STATE] += number * (cost[_DENSE] * dense[3] + cost[_EXPERT] * expert[3] + cost[_FROZEN])
        work[role] = max(work[role], cost[_WORKSPACE + level])


@njit(cache=True, no_cpython_wrapper=True)
def _pipeline(
    before: Floats, inner: Floats, behind: Floats, family: int, d: int, count: int, v: int, hop: float
) -> float:
    m = inner[_F] + inner[_I] + inner[_W]
    a = m + before[_F] + before[_I] + before[_W]
    b = m + behind[_F] + behind[_I] + behind[_W]
    total = a + (d - 2) * m + b
    longest = max(a, b)
    if family == 0:
        forward = inner[_F] + max(before[_F], behind[_F])
        backward = inner[_I] + inner[_W] + max(before[_I] + before[_W], behind[_I] + behind[_W])
        return float(total + (count - 1) * (forward + backward) + 2 * (d - 1) * hop)
    if family == 1:
        return float(_one_forward_one_backward(a, m, b, total, d, count, hop))
    if family == 2:
        return float(count * longest + (total - longest) / v + 2 * (d * v - 1) * hop)
    split = inner[_F] + inner[_I]
    if family == 3:
        bubble = max(0.0, split - inner[_W])
    elif family == 4:
        bubble = max(0.0, split - 2 * inner[_W])
    else:
        bubble = abs(split - 2 * inner[_W]) / 2
    return float(count * longest + (d - 1) * bubble + 2 * (d - 1) * hop)


@njit(cache=True, no_cpython_wrapper=True)
def _one_forward_one_backward(a: float, m: float, b: float, total: float, d: int, count: int, c: float) -> float:
    longest = count * (total / d + 2 * c * (d - 1) / d)
    for kind in range(4):
        if kind == 0:
            rank, own, before = 0, a, 0.0
        elif kind == 3:
            rank, own, before = d - 1, b, a + (d - 2) * m
        else:
            rank = 1 if kind == 1 else d - 2
            if not 0 < rank < d - 1:
                continue
            own, before = m, a + (rank - 1) * m
        longest = max(longest, before + count * own + 2 * rank * c)
        if count > d:
            behind = total - before - own
            around = before + (count - d + 1 + rank) * own + 2 * behind + (2 * rank + 4 * (d - 1 - rank)) * c
            longest = max(longest, around)
    return longest


@njit(cache=True, no_cpython_wrapper=True)
def _live(family: int, d: int, count: int, v: int) -> tuple[float, float]:
    if family == 0:
        return float(count), float(count)
    if family == 1:
        return float(min(count, d)), 1.0
    if family == 2:
        return min(count, d + (d - 1) / v), min(count, d - (d - 1) / v)
    if family == 4:
        return float(min(count, 2 * d - 1)), float(min(count, 2 * d - 1))
    return float(min(count, d)), float(min(count, d))
