"""The makespan of a fixed order, as fast as memory allows: the inner loop of every search.

A static order fixes its action graph, so its makespan is a longest path,

    M(x) = max over paths pi of  sum_s [ cF(pi,s) F_s + cI(pi,s) I_s + cW(pi,s) W_s ] + hops(pi) c + tail(rank where pi ends)

with integer counts that depend on the order only (a full backward B counts once as I and once as W). `compile_order`
sorts the graph topologically once; `makespan` is one sweep over it for a cost vector, `critical_path` also traces back
one longest path and returns its counts, a *cut*: a lower bound on M for every cost vector, and tight at this one.

Nodes are numbered from 1 in topological order; node 0 ends at time 0 and stands for "no predecessor". A node has at
most two predecessors, the one before it on its rank and one on another rank; joins of a stage graph and fused pairs
add nodes without duration. Messages cost `latency` and never wait for each other; the rich simulator (`simulate`) knows
links, memory and collectives, and agrees with this one where both apply.

Complexity: O(N) to compile and O(N) for a sweep, N actions; a sweep reads 13 bytes an action. Schedules with R or FILL
actions are refused, because their durations are not among F, I and W; communication, collective, optimizer and
offload rows take no time here and are skipped. The order is not validated beyond being free of deadlocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, REPLICA, SLICE, STAGE, Schedule
from stagewright.planner.simulation.chain_sweep import is_chain
from stagewright.planner.simulation.deadlock import explain_deadlock
from stagewright.planner.simulation.program import Program, flatten

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

_F, _B, _I, _W = int(Kind.F), int(Kind.B), int(Kind.I), int(Kind.W)


@dataclass(frozen=True, eq=False)
class CompiledOrder:
    """An order's action graph in topological order; reusable over cost vectors.

    Parameters
    ----------
    before : int32 [num_nodes + 1], node before this one on its rank, 0 for none.
    across : int32 [num_nodes + 1], node on another rank that this one waits for, 0 for none.
    hop : uint8 [num_nodes + 1], 1 where `across` pays the latency.
    code : int32 [num_nodes + 1], index into the vector that `durations` makes.
    rank : int32 [num_nodes + 1], where the node runs.
    last : int32 [num_ranks], last node of each rank, 0 for an idle one.
    num_stages, num_slices, num_ranks : sizes.
    num_actions : compute actions of the schedule, which is what throughput counts.
    """

    before: Ints
    across: Ints
    hop: Bytes
    code: Ints
    rank: Ints
    last: Ints
    num_stages: int
    num_slices: int
    num_ranks: int
    num_actions: int

    @property
    def num_nodes(self) -> int:
        return len(self.before) - 1

    def kind_stage(self) -> tuple[Ints, Ints]:
        """Return (kind, stage) of every node, -1 for node 0 and for nodes without duration."""
        real = self.code < 4 * self.num_stages * (self.num_slices + 1)
        real[0] = False
        return (
            np.where(real, self.code // self.num_stages % 4, -1).astype(np.int32),
            np.where(real, self.code % self.num_stages, -1).astype(np.int32),
        )


@dataclass(frozen=True, eq=False)
class Cut:
    """One longest path of an order: value = (counts . (F, I, W)) / num_slices + hops * latency + tail[end_rank].

    Parameters
    ----------
    makespan_s : the path's length, which is the makespan at the costs it was traced at.
    counts : int32 [3, num_stages], times F, I and W of each stage stand on the path, in units of 1 / num_slices.
    hops : messages between ranks on the path.
    end_rank : rank where the path ends.
    num_slices : denominator of `counts`; 1 unless the schedule is sliced.
    """

    makespan_s: float
    counts: Ints
    hops: int
    end_rank: int
    num_slices: int = 1

    def value(
        self, forward_s: Floats, input_grad_s: Floats, weight_grad_s: Floats, latency_s: float, tail_s: Floats
    ) -> float:
        """Return the path's length under other costs: a lower bound on the makespan of its order."""
        work = self.counts[0] @ forward_s + self.counts[1] @ input_grad_s + self.counts[2] @ weight_grad_s
        return float(work / self.num_slices + self.hops * latency_s + tail_s[self.end_rank])


def compile_order(schedule: Schedule) -> CompiledOrder:
    """Return the schedule's action graph in topological order; raises InvalidSchedule for a deadlock, with the cycle."""
    program = flatten(schedule)
    _refuse_untimed(program)
    count, done, before, across, hop, code, rank, last = _sorted(program)
    if (done < program.offset[1:]).any():
        raise explain_deadlock(schedule, (done - program.offset[:-1]).tolist())
    return CompiledOrder(
        before[: count + 1].copy(),
        across[: count + 1].copy(),
        hop[: count + 1].copy(),
        code[: count + 1].copy(),
        rank[: count + 1].copy(),
        last,
        schedule.num_stages,
        schedule.num_slices,
        schedule.num_ranks,
        int(program.kind_counts[: _W + 1].sum()),
    )


def stopped_at(program: Program) -> Ints:
    """Return the row where each rank stops, [num_ranks]: `program.offset[1:]` when the lists can run together."""
    return _sorted(program)[1]


def durations(order: CompiledOrder, forward_s: Floats, input_grad_s: Floats, weight_grad_s: Floats) -> Floats:
    """Return seconds by code: F, B, I, W of each stage for whole microbatches, then for slices, then a 0."""
    forward_s, input_grad_s = np.asarray(forward_s, np.float64), np.asarray(input_grad_s, np.float64)
    weight_grad_s = np.asarray(weight_grad_s, np.float64)
    whole = np.concatenate((forward_s, input_grad_s + weight_grad_s, input_grad_s, weight_grad_s), axis=-1)
    parts = [whole, *([whole / order.num_slices] * order.num_slices), np.zeros((*whole.shape[:-1], 1))]
    return np.ascontiguousarray(np.concatenate(parts, axis=-1))


def makespan(
    order: CompiledOrder,
    forward_s: Floats,
    input_grad_s: Floats,
    weight_grad_s: Floats,
    latency_s: float = 0.0,
    tail_s: Floats | None = None,
) -> float:
    """Return the seconds until every rank has run its order and its tail.

    Costs have shape [num_stages]; `tail_s`, shape [num_ranks], is added behind the last action of each rank.
    """
    tail = np.zeros(order.num_ranks) if tail_s is None else np.asarray(tail_s, np.float64)
    duration = durations(order, forward_s, input_grad_s, weight_grad_s)
    end = np.empty(order.num_nodes + 1)
    return float(
        longest_path(order.before, order.across, order.hop, order.code, order.last, duration, latency_s, tail, end)
    )


def makespans(
    order: CompiledOrder,
    forward_s: Floats,
    input_grad_s: Floats,
    weight_grad_s: Floats,
    latency_s: Floats | float = 0.0,
    tail_s: Floats | None = None,
) -> Floats:
    """Return the makespan of each cost vector; costs have shape [batch, num_stages], tails [batch, num_ranks]."""
    duration = durations(order, forward_s, input_grad_s, weight_grad_s)
    batch = len(duration)
    tail = np.zeros((batch, order.num_ranks)) if tail_s is None else np.ascontiguousarray(tail_s, np.float64)
    latency = np.ascontiguousarray(np.broadcast_to(np.asarray(latency_s, np.float64), (batch,)))
    return _batch(order.before, order.across, order.hop, order.code, order.last, duration, latency, tail)  # type: ignore[no-any-return]


def critical_path(
    order: CompiledOrder,
    forward_s: Floats,
    input_grad_s: Floats,
    weight_grad_s: Floats,
    latency_s: float = 0.0,
    tail_s: Floats | None = None,
) -> Cut:
    """Return one longest path as a cut; ties go to the lower rank and to the predecessor on the same rank."""
    tail = np.zeros(order.num_ranks) if tail_s is None else np.asarray(tail_s, np.float64)
    duration = durations(order, forward_s, input_grad_s, weight_grad_s)
    end = np.empty(order.num_nodes + 1)
    counts = np.zeros((3, order.num_stages), dtype=np.int32)
    value, hops, end_rank = _trace(
        order.before,
        order.across,
        order.hop,
        order.code,
        order.last,
        duration,
        latency_s,
        tail,
        order.num_slices,
        end,
        counts,
    )
    return Cut(float(value), counts, int(hops), int(end_rank), order.num_slices)


def critical_paths(
    order: CompiledOrder,
    forward_s: Floats,
    input_grad_s: Floats,
    weight_grad_s: Floats,
    latency_s: Floats | float = 0.0,
    tail_s: Floats | None = None,
) -> list[Cut]:
    """Return a cut for each cost vector; shapes as in `makespans`."""
    forward_s, input_grad_s, weight_grad_s = (np.atleast_2d(x) for x in (forward_s, input_grad_s, weight_grad_s))
    latency = np.broadcast_to(np.asarray(latency_s, np.float64), (len(forward_s),))
    tails = [None] * len(forward_s) if tail_s is None else list(tail_s)
    return [
        critical_path(order, forward_s[i], input_grad_s[i], weight_grad_s[i], float(latency[i]), tails[i])
        for i in range(len(forward_s))
    ]


@njit(cache=True)
def longest_path(
    before: Ints,
    across: Ints,
    hop: Bytes,
    code: Ints,
    last: Ints,
    duration: Floats,
    latency_s: float,
    tail_s: Floats,
    end: Floats,
) -> float:
    """Fill `end` [num_nodes + 1] with end times and return the makespan; for callers inside compiled loops."""
    end[0] = 0.0
    for node in range(1, len(before)):
        arrival = end[across[node]] + hop[node] * latency_s
        end[node] = max(end[before[node]], arrival) + duration[code[node]]
    value = 0.0
    for rank in range(len(last)):
        if last[rank] > 0:
            value = max(value, end[last[rank]] + tail_s[rank])
    return value


@njit(cache=True)
def _batch(
    before: Ints, across: Ints, hop: Bytes, code: Ints, last: Ints, duration: Floats, latency_s: Floats, tail_s: Floats
) -> Floats:
    values = np.empty(len(duration))
    end = np.empty(len(before))
    for index in range(len(duration)):
        values[index] = longest_path(
            before, across, hop, code, last, duration[index], latency_s[index], tail_s[index], end
        )
    return values


@njit(cache=True)
def _trace(
    before: Ints,
    across: Ints,
    hop: Bytes,
    code: Ints,
    last: Ints,
    duration: Floats,
    latency_s: float,
    tail_s: Floats,
    num_slices: int,
    end: Floats,
    counts: Ints,
) -> tuple[float, int, int]:
    value = longest_path(before, across, hop, code, last, duration, latency_s, tail_s, end)
    end_rank = 0
    for rank in range(len(last)):
        if last[rank] > 0 and end[last[rank]] + tail_s[rank] == value:
            end_rank = rank
            break
    num_stages = counts.shape[1]
    hops, node = 0, last[end_rank]
    while node > 0:
        block, cell = divmod(code[node], 4 * num_stages)
        if block <= num_slices:
            kind, stage = divmod(cell, num_stages)
            share = num_slices if block == 0 else 1
            if kind == 0:
                counts[0, stage] += share
            if kind in (1, 2):
                counts[1, stage] += share
            if kind in (1, 3):
                counts[2, stage] += share
        if end[across[node]] + hop[node] * latency_s > end[before[node]]:
            hops += hop[node]
            node = across[node]
        else:
            node = before[node]
    return value, hops, end_rank


def _refuse_untimed(program: Program) -> None:
    for kind in (Kind.R, Kind.FILL):
        if program.kind_counts[kind]:
            raise InvalidSchedule(
                f"the makespan kernel times F, B, I and W; the schedule holds {kind.name} actions",
                hint="use simulate(), which takes their seconds",
            )


@njit(cache=True)
def _count_nodes(program: Program) -> int:
    """Return an upper bound on nodes: an action each, and one for each message where there may be several."""
    rows, slices = program.rows, program.num_slices
    count = 0
    for index in range(len(rows)):
        kind, stage = rows[index, KIND], rows[index, STAGE]
        if kind > _W:
            continue
        degree = program.in_start[stage + 1] - program.in_start[stage]
        if kind != _F:
            degree = program.out_start[stage + 1] - program.out_start[stage]
        if rows[index, SLICE] < 0:
            degree *= slices
        fused = rows[index, FUSED] == 1 or (index > 0 and rows[index - 1, FUSED] == 1)
        count += 1 + (degree if degree > 1 or fused else 0)
    return count


def _sorted(program: Program) -> tuple[int, Ints, Ints, Ints, Bytes, Ints, Ints, Ints]:
    """Return (number of nodes, row where each rank stopped, and the arrays of CompiledOrder).

    Ranks that may go on are on a stack; each runs until its next row waits for a key, and whoever ends that key puts
    it back.
    """
    if is_chain(program):
        return _sort_chain(program)  # type: ignore[no-any-return]
    return _sort(program, _count_nodes(program))  # type: ignore[no-any-return]


@njit(cache=True)
def _sort_chain(program: Program) -> tuple[int, Ints, Ints, Ints, Bytes, Ints, Ints, Ints]:
    """Sort F, B, I and W with at most one stage before and after each, nothing fused: a node a row."""
    rows, offset, slices = program.rows, program.offset, program.num_slices
    placement, num_microbatches = program.placement, program.num_microbatches
    num_ranks, capacity = len(offset) - 1, len(rows)
    num_replicas, num_stages = placement.shape
    num_keys = num_replicas * num_stages * num_microbatches * slices
    forward = np.zeros(num_keys, dtype=np.int32)  # node that ends the forward of a key
    gradient = np.zeros(num_keys, dtype=np.int32)  # node that ends its B or I
    before = np.zeros(capacity + 1, dtype=np.int32)
    across = np.zeros(capacity + 1, dtype=np.int32)
    hop = np.zeros(capacity + 1, dtype=np.uint8)
    code = np.full(capacity + 1, 4 * num_stages * (slices + 1), dtype=np.int32)
    rank_of = np.zeros(capacity + 1, dtype=np.int32)
    last = np.zeros(num_ranks, dtype=np.int32)
    position = offset[:-1].copy()
    waits = np.full(num_ranks, -1, dtype=np.int64)  # 2 * key + (1 for gradient) that a stopped rank waits for
    stack = np.zeros(num_ranks + 1, dtype=np.int32)
    for rank in range(num_ranks):
        stack[num_ranks - 1 - rank] = rank
    stage_before, stage_after = np.full(num_stages, -1, np.int32), np.full(num_stages, -1, np.int32)
    for edge in range(len(program.edge_from)):
        stage_before[program.edge_to[edge]] = program.edge_from[edge]
        stage_after[program.edge_from[edge]] = program.edge_to[edge]
    depth, count = num_ranks, 0
    while depth > 0:
        depth -= 1
        rank = stack[depth]
        waits[rank] = -1
        index = position[rank]
        while index < offset[rank + 1]:
            kind, replica, stage = rows[index, KIND], rows[index, REPLICA], rows[index, STAGE]
            microbatch, part = rows[index, MICROBATCH], max(rows[index, SLICE], 0)
            own = ((replica * num_stages + stage) * num_microbatches + microbatch) * slices + part
            other, node, onward = -1, 0, -1
            if kind == _W:
                if gradient[own] == 0:
                    break
            else:
                other, onward = stage_before[stage], stage_after[stage]
                table, flag = forward, 0
                if kind != _F:
                    if forward[own] == 0:
                        break
                    other, onward = onward, other
                    table, flag = gradient, 1
                if other >= 0:
                    key = ((replica * num_stages + other) * num_microbatches + microbatch) * slices + part
                    node = table[key]
                    if node == 0:
                        waits[rank] = 2 * key + flag
                        break
                table[own] = count + 1
            count += 1
            before[count] = last[rank]
            last[rank] = count
            rank_of[count] = rank
            code[count] = ((rows[index, SLICE] + 1 if slices > 1 else 0) * 4 + kind) * num_stages + stage
            if other >= 0 and placement[replica, other] != rank:
                across[count] = node
                hop[count] = 1
            if onward >= 0:
                target = placement[replica, onward]
                if target != rank and waits[target] == 2 * own + (0 if kind == _F else 1):
                    waits[target] = -1
                    stack[depth] = target
                    depth += 1
            index += 1
        position[rank] = index
    return count, position, before, across, hop, code, rank_of, last


@njit(cache=True)
def _sort(program: Program, capacity: int) -> tuple[int, Ints, Ints, Ints, Bytes, Ints, Ints, Ints]:
    """Sort any schedule: joins, fused groups, whole microbatches among slices."""
    rows, offset, slices = program.rows, program.offset, program.num_slices
    num_ranks = len(offset) - 1
    num_replicas, num_stages = program.placement.shape
    num_keys = num_replicas * num_stages * program.num_microbatches * slices
    forward = np.zeros(num_keys, dtype=np.int32)
    gradient = np.zeros(num_keys, dtype=np.int32)
    before = np.zeros(capacity + 1, dtype=np.int32)
    across = np.zeros(capacity + 1, dtype=np.int32)
    hop = np.zeros(capacity + 1, dtype=np.uint8)
    code = np.full(capacity + 1, 4 * num_stages * (slices + 1), dtype=np.int32)
    rank_of = np.zeros(capacity + 1, dtype=np.int32)
    last = np.zeros(num_ranks, dtype=np.int32)
    position = offset[:-1].copy()
    waits = np.full(num_ranks, -1, dtype=np.int64)
    stack = np.zeros(num_ranks + 1, dtype=np.int32)
    for rank in range(num_ranks):
        stack[num_ranks - 1 - rank] = rank
    found = np.empty((len(program.edge_from) + 1) * slices, dtype=np.int32)
    depth, count = num_ranks, 0
    while depth > 0:
        depth -= 1
        rank = stack[depth]
        waits[rank] = -1
        first = position[rank]
        while first < offset[rank + 1]:
            after = _group_end(rows, first, offset[rank + 1])
            waits[rank] = _first_missing(program, first, after, forward, gradient)
            if waits[rank] >= 0:
                break
            start = count
            count = _add_group(
                program, first, after, rank, forward, gradient, before, across, hop, code, last, found, count
            )
            rank_of[start + 1 : count + 1] = rank
            for index in range(first, after):
                if rows[index, KIND] <= _I:
                    depth = _finish(program, index, count, rank, forward, gradient, waits, stack, depth)
            first = after
        position[rank] = first
    return count, position, before, across, hop, code, rank_of, last


@njit(cache=True, no_cpython_wrapper=True)
def _group_end(rows: Ints, first: int, stop: int) -> int:
    after = first + 1
    while rows[after - 1, FUSED] == 1 and after < stop:
        after += 1
    return after


@njit(cache=True, no_cpython_wrapper=True, inline="always")
def _key(program: Program, replica: int, stage: int, microbatch: int) -> int:
    num_stages = program.placement.shape[1]
    return int(((replica * num_stages + stage) * program.num_microbatches + microbatch) * program.num_slices)


@njit(cache=True, no_cpython_wrapper=True)
def _first_missing(program: Program, first: int, after: int, forward: Ints, gradient: Ints) -> int:
    """Return 2 * key + (1 for a gradient) of the first dependency that is not done, or -1."""
    rows, slices = program.rows, program.num_slices
    for index in range(first, after):
        kind = rows[index, KIND]
        if kind > _W:
            continue
        replica, stage, microbatch = rows[index, REPLICA], rows[index, STAGE], rows[index, MICROBATCH]
        low = max(rows[index, SLICE], 0)
        high = slices if rows[index, SLICE] < 0 else low + 1
        own = _key(program, replica, stage, microbatch)
        for part in range(low, high):
            if kind == _F:
                for place in range(program.in_start[stage], program.in_start[stage + 1]):
                    source = program.edge_from[program.in_edge[place]]
                    key = _key(program, replica, source, microbatch) + part
                    if forward[key] == 0:
                        return int(2 * key)
            elif kind == _W:
                if gradient[own + part] == 0:
                    return int(2 * (own + part) + 1)
            else:
                if forward[own + part] == 0:
                    return int(2 * (own + part))
                for place in range(program.out_start[stage], program.out_start[stage + 1]):
                    target = program.edge_to[program.out_edge[place]]
                    key = _key(program, replica, target, microbatch) + part
                    if gradient[key] == 0:
                        return int(2 * key + 1)
    return -1


@njit(cache=True, no_cpython_wrapper=True)
def _cross_nodes(program: Program, index: int, rank: int, forward: Ints, gradient: Ints, found: Ints) -> int:
    """Write the nodes on other ranks that row `index` waits for into `found`; return how many."""
    rows, slices = program.rows, program.num_slices
    kind = rows[index, KIND]
    if kind >= _W:
        return 0
    replica, stage, microbatch = rows[index, REPLICA], rows[index, STAGE], rows[index, MICROBATCH]
    low = max(rows[index, SLICE], 0)
    high = slices if rows[index, SLICE] < 0 else low + 1
    count = 0
    start, stop = program.in_start[stage], program.in_start[stage + 1]
    if kind != _F:
        start, stop = program.out_start[stage], program.out_start[stage + 1]
    for place in range(start, stop):
        other = program.edge_from[program.in_edge[place]] if kind == _F else program.edge_to[program.out_edge[place]]
        if program.placement[replica, other] == rank:
            continue
        key = _key(program, replica, other, microbatch)
        for part in range(low, high):
            node = forward[key + part] if kind == _F else gradient[key + part]
            if count == 0 or found[count - 1] != node:
                found[count] = node
                count += 1
    return count


@njit(cache=True, no_cpython_wrapper=True)
def _add_group(
    program: Program,
    first: int,
    after: int,
    rank: int,
    forward: Ints,
    gradient: Ints,
    before: Ints,
    across: Ints,
    hop: Bytes,
    code: Ints,
    last: Ints,
    found: Ints,
    count: int,
) -> int:
    """Add the nodes of rows `first` to `after`, which run as one; return the node count.

    Every message of the group gets a node without duration on the rank, so that the group's first action starts after
    all of them; then the actions follow each other, and the last node ends them all.
    """
    rows, num_stages = program.rows, program.placement.shape[1]
    single = 0  # the one message of a single action needs no node of its own
    for index in range(first, after):
        messages = _cross_nodes(program, index, rank, forward, gradient, found)
        if messages == 1 and after - first == 1:
            single = found[0]
            break
        for place in range(messages):
            count += 1
            before[count] = last[rank]
            across[count] = found[place]
            hop[count] = 1
            last[rank] = count
    for index in range(first, after):
        if rows[index, KIND] <= _W:
            count += 1
            before[count] = last[rank]
            last[rank] = count
            block = 0 if program.num_slices == 1 else rows[index, SLICE] + 1
            code[count] = (block * 4 + rows[index, KIND]) * num_stages + rows[index, STAGE]
            if single > 0:
                across[count] = single
                hop[count] = 1
    return count


@njit(cache=True, no_cpython_wrapper=True)
def _finish(
    program: Program,
    index: int,
    node: int,
    rank: int,
    forward: Ints,
    gradient: Ints,
    waits: npt.NDArray[np.int64],
    stack: Ints,
    depth: int,
) -> int:
    """Record the node that ends the row's key and wake the ranks that wait for it; return the stack's depth."""
    rows, slices = program.rows, program.num_slices
    kind, replica, stage = rows[index, KIND], rows[index, REPLICA], rows[index, STAGE]
    key = _key(program, replica, stage, rows[index, MICROBATCH])
    low = max(rows[index, SLICE], 0)
    high = slices if rows[index, SLICE] < 0 else low + 1
    table, flag = (forward, 0) if kind == _F else (gradient, 1)
    for part in range(low, high):
        table[key + part] = node
    start, stop = program.out_start[stage], program.out_start[stage + 1]
    if kind != _F:
        start, stop = program.in_start[stage], program.in_start[stage + 1]
    for place in range(start, stop):
        other = program.edge_to[program.out_edge[place]] if kind == _F else program.edge_from[program.in_edge[place]]
        target = program.placement[replica, other]
        wanted = waits[target] >> 1
        if target != rank and waits[target] >= 0 and key + low <= wanted < key + high and (waits[target] & 1) == flag:
            waits[target] = -1
            stack[depth] = target
            depth += 1
    return depth
