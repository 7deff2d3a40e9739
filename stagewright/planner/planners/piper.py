"""Piper's planner: pipeline, data and tensor parallelism with recomputation (Tarnawski et al., NeurIPS 2021).

Stages are differences of nested ideals; a stage has one data-parallel degree d (a divisor of the N microbatches), one
tensor degree t, and for each node recomputation or not. Its time for one microbatch and its memory are

    TPS = ( sum p + E / bandwidth ) / d + 4 (d - 1) / d * sum w / (N bandwidth)
    sum (a y + b) <= M,      y = ceil( sum of d over this and later stages / d )

with E the bytes that cross the stage's borders. The largest TPS is minimised over stages with sum of d t <= K.

*Method* (ours; Piper's own programme is over ideals x devices x sum of d). For a target X the least devices that cover
everything from an ideal on, with a sum s of data-parallel degrees,

    g[I', s + d] = min over I > I', t, d of g[I, s] + d t   where the stage I \\ I' has TPS <= X for y = ceil((s + d) / d),

is one pass of O(|pairs| * #t * #d * s) additions, because TPS grows with y, so that each (pair, t, d) admits all s up
to a bound. X is bisected between a feasible and an infeasible target until the plan found cannot be bettered by one
part in 10^12. Which nodes recompute is an exact knapsack (branch and bound; Piper's is greedy), so the result is
optimal for the objective.

On the common Problem all stages have equal (d, t): for each configuration the largest TPS, times T for a step, is
minimised over cuts with the exact knapsack of each range and y = min(T, D - stage).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.errors import Infeasible
from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.ideals import IdealLattice
from stagewright.planner.search.problem import Partition

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

UNREACHED = 1 << 30
CERTAIN = 1e-12


@dataclass(frozen=True, eq=False)
class TensorGraph:
    """Nodes with costs by tensor degree and recomputation (index 0 without, 1 with), and edges between them.

    Parameters
    ----------
    tensor_degrees : the t offered, shape [T].
    time_s, static_bytes, stash_bytes : p, b and a, shape [T, 2, num_nodes]; inf where not offered.
    weight_bytes : w, shape [T, num_nodes].
    edge_from, edge_to, edge_bytes : shape [num_edges].
    forward_sync_bytes : extra bytes on an edge by its head's configuration, shape [T, 2, num_edges].
    backward_sync_bytes : extra bytes on an edge by its tail's configuration, shape [T, 2, num_edges].
    """

    tensor_degrees: Ints
    time_s: Floats
    static_bytes: Floats
    stash_bytes: Floats
    weight_bytes: Floats
    edge_from: Ints
    edge_to: Ints
    edge_bytes: Floats
    forward_sync_bytes: Floats
    backward_sync_bytes: Floats


@dataclass(frozen=True)
class TensorStage:
    """Nodes of a stage, its degrees, the nodes that recompute, and its time for one microbatch."""

    nodes: tuple[int, ...]
    data_parallel: int
    tensor_parallel: int
    recompute: tuple[int, ...]
    time_s: float


@dataclass(frozen=True)
class TensorPartition:
    """The optimal bottleneck with stages from the model's input to its output."""

    bottleneck_s: float
    stages: tuple[TensorStage, ...]


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Candidate stages: sums over their nodes and the recomputation choice of each, by (tensor degree, pair)."""

    begin: Ints
    end: Ints
    first: Ints
    time_s: Floats
    weight_bytes: Floats
    stash_bytes: Floats
    static_bytes: Floats
    extra_s: Floats
    saved_stash: Floats
    saved_static: Floats
    item_node: Ints
    num_items: Ints


def piper_partition(
    graph: TensorGraph,
    lattice: IdealLattice,
    *,
    num_devices: int,
    memory_bytes: float,
    num_microbatches: int,
    bytes_per_s: float,
) -> TensorPartition:
    """Return the partition with the smallest time per microbatch; raises Infeasible when none fits the memory."""
    pairs = _stage_candidates(graph, lattice, bytes_per_s)
    most = min(num_devices, num_microbatches)
    divisors = np.array([d for d in range(1, most + 1) if num_microbatches % d == 0], dtype=np.int64)
    known = np.full((*pairs.time_s.shape, most + 2), -1.0)
    tables = (
        lattice.num_ideals,
        pairs.begin,
        pairs.end,
        pairs.first,
        pairs.time_s,
        pairs.weight_bytes,
        pairs.stash_bytes,
        pairs.static_bytes,
        pairs.extra_s,
        pairs.saved_stash,
        pairs.saved_static,
        pairs.num_items,
        graph.tensor_degrees,
        divisors,
        float(memory_bytes),
        4.0 / (num_microbatches * bytes_per_s),
        known,
    )
    top = 2.0 * float(np.nansum(np.where(np.isfinite(graph.time_s), graph.time_s, np.nan))) + float(
        (2 * graph.edge_bytes + graph.forward_sync_bytes + graph.backward_sync_bytes).sum() / bytes_per_s
        + 4.0 * graph.weight_bytes[np.isfinite(graph.weight_bytes)].sum() / (num_microbatches * bytes_per_s)
    )
    best = _plan_at(top, tables, most, num_devices)
    if best is None:
        raise Infeasible(
            f"no partition on {num_devices} devices fits {memory_bytes:g} bytes a device", field="memory_bytes"
        )
    value, chosen = best
    low, target = 0.0, value * (1 - CERTAIN)
    while True:
        found = _plan_at(target, tables, most, num_devices)
        if found is None:
            low = target
        else:
            value, chosen = found
        if low >= value * (1 - CERTAIN):
            break
        target = max((low + value) / 2, low * (1 + CERTAIN)) if value - low > 1e-9 * value else value * (1 - CERTAIN)
    stages = [_stage(graph, lattice, pairs, row, memory_bytes) for row in chosen]
    return TensorPartition(value, tuple(stages))


def _plan_at(target: float, tables: tuple[object, ...], most: int, num_devices: int) -> tuple[float, Ints] | None:
    """Return (bottleneck, rows of (pair, tensor index, d, y, time)) of a plan no slower than `target`, or None."""
    feasible, value, rows = _cover(target, most, num_devices, *tables)
    return (value, rows) if feasible else None


def _stage_candidates(graph: TensorGraph, lattice: IdealLattice, bytes_per_s: float) -> _Pairs:
    members = lattice.members
    inside = members.astype(np.float64)
    nested = (inside @ (1.0 - inside.T) == 0) & ~np.eye(len(members), dtype=np.bool_)
    begin, end = np.nonzero(nested)
    order = np.lexsort((end, begin))
    begin, end = begin[order], end[order]
    num_pairs, num_nodes, degrees = len(begin), members.shape[1], len(graph.tensor_degrees)
    selected = members[end] & ~members[begin]
    crossing_in = selected[:, graph.edge_to] & ~selected[:, graph.edge_from]
    crossing_out = selected[:, graph.edge_from] & ~selected[:, graph.edge_to]
    time_s = np.zeros((degrees, num_pairs))
    extra_s = np.zeros((degrees, num_pairs, num_nodes))
    saved_stash, saved_static = np.zeros_like(extra_s), np.zeros_like(extra_s)
    stash, static, weight = np.zeros_like(time_s), np.zeros_like(time_s), np.zeros_like(time_s)
    item_node = np.zeros((degrees, num_pairs, num_nodes), dtype=np.int64)
    num_items = np.zeros((degrees, num_pairs), dtype=np.int64)
    for degree in range(degrees):
        node_time = np.zeros((2, num_pairs, num_nodes))
        for level in range(2):
            per_edge_in = 2.0 * (graph.edge_bytes + graph.forward_sync_bytes[degree, level]) / bytes_per_s
            per_edge_out = 2.0 * (graph.edge_bytes + graph.backward_sync_bytes[degree, level]) / bytes_per_s
            node_time[level] = np.where(selected, graph.time_s[degree, level], 0.0)
            for edge, (tail, head) in enumerate(zip(graph.edge_from, graph.edge_to, strict=True)):
                node_time[level, :, head] += crossing_in[:, edge] * per_edge_in[edge]
                node_time[level, :, tail] += crossing_out[:, edge] * per_edge_out[edge]
        for pair in range(num_pairs):
            nodes = np.flatnonzero(selected[pair])
            plain = node_time[0, pair, nodes]
            extra = node_time[1, pair, nodes] - plain
            less_stash = graph.stash_bytes[degree, 0, nodes] - graph.stash_bytes[degree, 1, nodes]
            less_static = graph.static_bytes[degree, 0, nodes] - graph.static_bytes[degree, 1, nodes]
            forced = ~np.isfinite(plain) | (
                (extra <= 0) & (less_stash >= 0) & (less_static >= 0) & (less_stash + less_static > 0)
            )
            level = forced.astype(np.int64)
            time_s[degree, pair] = node_time[level, pair, nodes].sum()
            stash[degree, pair] = graph.stash_bytes[degree, level, nodes].sum()
            static[degree, pair] = graph.static_bytes[degree, level, nodes].sum()
            weight[degree, pair] = graph.weight_bytes[degree, nodes].sum()
            useful = np.flatnonzero(~forced & np.isfinite(extra) & ((less_stash > 0) | (less_static > 0)))
            useful = useful[np.lexsort((less_static[useful], less_stash[useful], extra[useful]))]
            count = len(useful)
            num_items[degree, pair] = count
            extra_s[degree, pair, :count] = extra[useful]
            saved_stash[degree, pair, :count] = less_stash[useful]
            saved_static[degree, pair, :count] = less_static[useful]
            item_node[degree, pair, :count] = nodes[useful]
    first = np.searchsorted(begin, np.arange(lattice.num_ideals + 1)).astype(np.int64)
    return _Pairs(
        begin.astype(np.int64),
        end.astype(np.int64),
        first,
        time_s,
        weight,
        stash,
        static,
        extra_s,
        saved_stash,
        saved_static,
        item_node,
        num_items,
    )


def _stage(graph: TensorGraph, lattice: IdealLattice, pairs: _Pairs, row: Floats, memory_bytes: float) -> TensorStage:
    pair, degree, data, stashes = (int(value) for value in row[:4])
    count = int(pairs.num_items[degree, pair])
    need = pairs.stash_bytes[degree, pair] * stashes + pairs.static_bytes[degree, pair] - memory_bytes
    saved = pairs.saved_stash[degree, pair, :count] * stashes + pairs.saved_static[degree, pair, :count]
    _, picked = _cheapest_cover(pairs.extra_s[degree, pair, :count], saved, need)
    nodes = np.flatnonzero(lattice.members[pairs.end[pair]] & ~lattice.members[pairs.begin[pair]])
    recompute = tuple(sorted(int(node) for node in pairs.item_node[degree, pair, :count][picked]))
    return TensorStage(tuple(nodes.tolist()), data, int(graph.tensor_degrees[degree]), recompute, float(row[4]))


@njit(cache=True)
def _cheapest_cover(cost: Floats, saved: Floats, need: float) -> tuple[float, npt.NDArray[np.bool_]]:
    """Return the least cost of items whose savings reach `need`, and the items: exact, by depth-first branch and bound.

    Items are tried by cost for each byte saved; the bound fills the rest fractionally. Of items that save the same, the
    cheaper are taken first: once one is left out, so are all after it.
    """
    count = len(cost)
    picked = np.zeros(count, dtype=np.bool_)
    if need <= 0:
        return 0.0, picked
    if np.maximum(saved, 0.0).sum() < need:
        return np.inf, picked
    ratio = np.empty(count)
    for item in range(count):
        ratio[item] = cost[item] / saved[item] if saved[item] > 0 else np.inf
    order = np.argsort(ratio, kind="mergesort")
    kind = np.empty(count, dtype=np.int64)
    for level in range(count):
        kind[level] = level
        for other in range(level):
            if saved[order[other]] == saved[order[level]]:
                kind[level] = other
                break
    closed = np.zeros(count, dtype=np.int64)
    best = np.inf
    taken = np.zeros(count, dtype=np.bool_)
    state = np.zeros(count + 1, dtype=np.int8)  # 0 to enter, 1 taken, 2 left out
    left = np.zeros(count + 1)
    spent = np.zeros(count + 1)
    left[0] = need
    depth = 0
    while depth >= 0:
        if state[depth] == 0:
            if left[depth] <= 0:
                if spent[depth] < best:
                    best = spent[depth]
                    picked[:] = False
                    for level in range(depth):
                        if taken[level]:
                            picked[order[level]] = True
                depth -= 1
                continue
            if _fractional_bound(depth, spent[depth], left[depth], order, cost, saved, kind, closed) >= best * (
                1 - 1e-13
            ):
                depth -= 1
                continue
            state[depth] = 1 if closed[kind[depth]] == 0 else 2
            taken[depth] = state[depth] == 1
        elif state[depth] == 1:
            state[depth] = 2
            taken[depth] = False
        else:
            closed[kind[depth]] -= 1
            depth -= 1
            continue
        item = order[depth]
        if taken[depth]:
            left[depth + 1] = left[depth] - saved[item]
            spent[depth + 1] = spent[depth] + cost[item]
        else:
            closed[kind[depth]] += 1
            left[depth + 1] = left[depth]
            spent[depth + 1] = spent[depth]
        depth += 1
        state[depth] = 0
    return best, picked


@njit(cache=True, no_cpython_wrapper=True)
def _fractional_bound(
    depth: int, spent: float, left: float, order: Ints, cost: Floats, saved: Floats, kind: Ints, closed: Ints
) -> float:
    bound = spent
    for level in range(depth, len(order)):
        item = order[level]
        if closed[kind[level]] or saved[item] <= 0:
            continue
        if saved[item] >= left:
            return float(bound + cost[item] * left / saved[item])
        bound += cost[item]
        left -= saved[item]
    return np.inf


@njit(cache=True, no_cpython_wrapper=True)
def _recompute_s(
    stashes: int,
    degree: int,
    pair: int,
    stash_bytes: Floats,
    static_bytes: Floats,
    extra_s: Floats,
    saved_stash: Floats,
    saved_static: Floats,
    num_items: Ints,
    memory_bytes: float,
    known: Floats,
) -> float:
    """Return the least recomputation seconds with which `stashes` fit, inf when none do; computed once."""
    if known[degree, pair, stashes] < 0:
        count = num_items[degree, pair]
        need = stash_bytes[degree, pair] * stashes + static_bytes[degree, pair] - memory_bytes
        saved = saved_stash[degree, pair, :count] * stashes + saved_static[degree, pair, :count]
        known[degree, pair, stashes] = _cheapest_cover(extra_s[degree, pair, :count], saved, need)[0]
    return float(known[degree, pair, stashes])


@njit(cache=True)
def _cover(
    target: float,
    most: int,
    num_devices: int,
    num_ideals: int,
    begin: Ints,
    end: Ints,
    first: Ints,
    time_s: Floats,
    weight_bytes: Floats,
    stash_bytes: Floats,
    static_bytes: Floats,
    extra_s: Floats,
    saved_stash: Floats,
    saved_static: Floats,
    num_items: Ints,
    tensor_degrees: Ints,
    divisors: Ints,
    memory_bytes: float,
    sync_s_per_byte: float,
    known: Floats,
) -> tuple[bool, float, Floats]:
    """Return whether all nodes can be covered with stages no slower than `target`, the bottleneck, and the stages.

    `known[degree, pair, y]` caches the least recomputation seconds for y stashes, -1 where not computed.
    """
    devices = np.full((num_ideals, most + 1), UNREACHED, dtype=np.int32)
    choice_pair = np.zeros((num_ideals, most + 1), dtype=np.int32)
    choice_degree = np.zeros((num_ideals, most + 1), dtype=np.int16)
    choice_data = np.zeros((num_ideals, most + 1), dtype=np.int32)
    devices[num_ideals - 1, 0] = 0
    for ideal in range(num_ideals - 2, -1, -1):
        for pair in range(first[ideal], first[ideal + 1]):
            later = end[pair]
            for degree in range(len(tensor_degrees)):
                tensor = tensor_degrees[degree]
                base = time_s[degree, pair]
                if not np.isfinite(base):
                    continue
                for position in range(len(divisors)):
                    data = divisors[position]
                    if data * tensor > num_devices:
                        break
                    sync = sync_s_per_byte * (data - 1) / data * weight_bytes[degree, pair]
                    slack = (target - sync) * data - base
                    if slack < 0:
                        continue
                    largest = _most_stashes(
                        slack,
                        most // data + 1,
                        degree,
                        pair,
                        stash_bytes,
                        static_bytes,
                        extra_s,
                        saved_stash,
                        saved_static,
                        num_items,
                        memory_bytes,
                        known,
                    )
                    stop = min(largest * data, most) - data
                    step = np.int32(data * tensor)
                    for total in range(stop + 1):
                        value = devices[later, total] + step
                        if value < devices[ideal, total + data] and value <= num_devices:
                            devices[ideal, total + data] = value
                            choice_pair[ideal, total + data] = pair
                            choice_degree[ideal, total + data] = degree
                            choice_data[ideal, total + data] = data
    total = -1
    for candidate in range(1, most + 1):
        if devices[0, candidate] <= num_devices:
            total = candidate
            break
    rows = np.zeros((num_ideals, 5))
    if total < 0:
        return False, np.inf, rows[:0]
    bottleneck = 0.0
    count = 0
    ideal = 0
    while ideal != num_ideals - 1:
        pair, degree, data = choice_pair[ideal, total], choice_degree[ideal, total], choice_data[ideal, total]
        stashes = (total + data - 1) // data
        sync = sync_s_per_byte * (data - 1) / data * weight_bytes[degree, pair]
        extra = _recompute_s(
            stashes,
            degree,
            pair,
            stash_bytes,
            static_bytes,
            extra_s,
            saved_stash,
            saved_static,
            num_items,
            memory_bytes,
            known,
        )
        seconds = (time_s[degree, pair] + extra) / data + sync
        rows[count, 0] = pair
        rows[count, 1] = degree
        rows[count, 2] = data
        rows[count, 3] = stashes
        rows[count, 4] = seconds
        bottleneck = max(bottleneck, seconds)
        count += 1
        total -= data
        ideal = end[pair]
    return True, bottleneck, rows[:count]


@njit(cache=True, no_cpython_wrapper=True)
def _most_stashes(
    slack_s: float,
    limit: int,
    degree: int,
    pair: int,
    stash_bytes: Floats,
    static_bytes: Floats,
    extra_s: Floats,
    saved_stash: Floats,
    saved_static: Floats,
    num_items: Ints,
    memory_bytes: float,
    known: Floats,
) -> int:
    """Return the most stashes y <= limit for which the memory fits with at most `slack_s` of recomputation."""
    low = 0
    high = limit
    while low < high:
        middle = (low + high + 1) // 2
        seconds = _recompute_s(
            middle,
            degree,
            pair,
            stash_bytes,
            static_bytes,
            extra_s,
            saved_stash,
            saved_static,
            num_items,
            memory_bytes,
            known,
        )
        if seconds <= slack_s:
            low = middle
        else:
            high = middle - 1
    return low


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    count = table.num_microbatches
    plain = table.time_s + 2.0 * (table.in_hop_s + table.out_hop_s) + table.reduction_s / count
    cost = table.with_least_recompute(plain)
    found = None if cost is None else least_bottleneck(cost, table.num_ranks)
    if found is not None:
        partition = table.fitted(found.bounds)
        assert partition is not None
        yield count * found.value, partition


PLANNER = table_planner(
    "piper",
    "Tarnawski et al., Piper: Multidimensional Planner for DNN Parallelization, NeurIPS 2021",
    _solve_one,
    reach=Reach(tensor=True, axis_orders=True),
    lower_bound=lambda table: table.least_rate_s,
    objective="seconds of a step at the slowest stage's rate",
)
