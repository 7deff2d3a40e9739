"""The event times of a schedule whose resources are all served in a static order: one longest-path sweep.

Compute of a rank, each directed link, each rank's collective lane and each direction of its peer and host lanes serve
their work in an order that the rank's own list fixes, because whatever a rank issues, it issues in program order. Then
event times are max-plus expressions of each other,

    start(x) = max over x's predecessors (list, message, lane) of end,      end(x) = start(x) + duration(x)

and need no event queue: ranks that can go on are on a stack, each runs until its next row waits for something that has
no time yet. O(N + M) for N rows and M messages. Every node remembers the predecessor that set its start, from which the
critical path is traced. Shared links with arbitration by time are the business of `events`.

Nodes 0 to N - 1 are the schedule's rows, nodes N on are messages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, REPLICA, SLICE, STAGE
from stagewright.planner.simulation.program import Program
from stagewright.planner.simulation.timeline import COLLECTIVE_LANE, COMPUTE_LANE, HOST_LANE, SEND_LANE

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_F, _B, _I, _W, _R = int(Kind.F), int(Kind.B), int(Kind.I), int(Kind.W), int(Kind.R)
_SEND_F, _RECV_F, _SEND_B, _RECV_B = int(Kind.SEND_F), int(Kind.RECV_F), int(Kind.SEND_B), int(Kind.RECV_B)
_UNSHARD, _RESHARD = int(Kind.UNSHARD), int(Kind.RESHARD)
_REDUCE_GRAD, _OPT = int(Kind.REDUCE_GRAD), int(Kind.OPT)
_OFFLOAD, _RELOAD, _EVICT, _LOAD, _FILL = (
    int(Kind.OFFLOAD),
    int(Kind.RELOAD),
    int(Kind.EVICT),
    int(Kind.LOAD),
    int(Kind.FILL),
)
_NOTHING, _FOREVER, _LANE = -1, -2, -3  # what a rank waits for, when not for a message
_SEVERAL = -2  # a stage with more than one edge on that side
_FORWARD_DONE, _GRADIENT_DONE, _AWAY, _RETURNED = 1, 2, 4, 8  # bits of a key's progress


class Work(NamedTuple):
    """Seconds and shares by kind, stage, slice and microbatch.

    `seconds` is float64 [num_kinds, num_stages]; `time_share` and `size_share` are [num_slices + 1], whole microbatches
    at 0; `time_factor` and `size_factor` are [num_microbatches]; `activation` is [num_stages]; `overlap_s` is
    [num_stages, num_stages] with NaN for "the sum"; `fill_s` is [num_items].
    """

    seconds: Floats
    time_share: Floats
    size_share: Floats
    time_factor: Floats
    size_factor: Floats
    activation: Floats
    overlap_s: Floats
    fill_s: Floats


class Network(NamedTuple):
    """Links as arrays: [num_ranks, num_ranks] for pairs, [num_edges] for bytes; `second_per_byte` 0 is unlimited.

    `sends_are_rows`: messages leave where the lists hold SEND rows, not at the end of their producer. `plain`: no rows
    move activations or gather parameters. `joint`: the replicas of a stage reduce their gradients together.
    """

    latency_s: Floats
    second_per_byte: Floats
    forward_bytes: Floats
    gradient_bytes: Floats
    overlap: bool
    collectives_overlap: bool
    peer_latency_s: float
    peer_second_per_byte: float
    host_latency_s: float
    host_second_per_byte: float
    sends_are_rows: bool
    plain: bool
    has_moves: bool
    joint: bool


class Swept(NamedTuple):
    """Times of all nodes, and where each rank stopped (its end, unless the schedule deadlocks).

    `lane` is -1 for rows without a span. Messages: `message_row` is the row that caused it, `message_edge` its stage
    edge, `message_bytes` its size; message j is node N + j. `free_s` and `last` are, by rank, when its compute ended and
    the node that ended it; `arrived_*` hold, by edge key, the node that brought it, + 1.
    """

    start_s: Floats
    end_s: Floats
    lane: npt.NDArray[np.int8]
    before: Ints
    message_row: Ints
    message_edge: Ints
    message_bytes: Floats
    num_messages: int
    position: Ints
    free_s: Floats
    last: Ints
    arrived_forward: Ints
    arrived_gradient: Ints


class _State(NamedTuple):
    start_s: Floats
    end_s: Floats
    before: Ints
    lane: npt.NDArray[np.int8]
    message_row: Ints
    message_edge: Ints
    message_bytes: Floats
    num_messages: Ints  # [1]
    arrived_forward: Ints  # by edge key: node that brings it, + 1
    arrived_gradient: Ints
    progress: Bytes  # by key
    back: Ints  # by key: node that brings an evicted or offloaded activation back, + 1
    free_s: Floats  # by rank: end of its compute so far
    last: Ints  # by rank: node that set free_s, or -1
    compute_start_s: Floats  # by rank: start of its last compute row
    waits: Longs  # by rank
    link_free_s: Floats  # [num_ranks, num_ranks]
    link_last: Ints
    side_free_s: Floats  # [num_ranks, 5]: collectives, evict, load, offload, reload
    side_last: Ints
    queue: Ints  # collective rows that were issued, in list order, at the rows' own offsets
    queue_head: Ints
    queue_tail: Ints
    issue_s: Floats  # by row, collectives only
    issue_last: Ints
    pending: Ints  # [2, num_replicas * num_stages]: last UNSHARD and REDUCE_GRAD row passed, + 1
    joined: Ints  # by stage: members of the reduction that have arrived
    joining: Bytes  # by rank: whether it stands in a reduction of several ranks
    stack: Ints
    depth: Ints  # [1]
    stacked: Bytes


@njit(cache=True)
def count_messages(program: Program, sends_are_rows: bool) -> int:
    """Return an upper bound on the messages between ranks."""
    rows, placement = program.rows, program.placement
    count = 0
    for index in range(len(rows)):
        kind, replica, stage = rows[index, KIND], rows[index, REPLICA], rows[index, STAGE]
        if sends_are_rows:
            forward, backward = kind == _SEND_F, kind == _SEND_B
        else:
            forward, backward = kind == _F, kind in (_B, _I)
        if forward:
            for place in range(program.out_start[stage], program.out_start[stage + 1]):
                target = program.edge_to[program.out_edge[place]]
                count += placement[replica, target] != placement[replica, stage]
        elif backward:
            for place in range(program.in_start[stage], program.in_start[stage + 1]):
                target = program.edge_from[program.in_edge[place]]
                count += placement[replica, target] != placement[replica, stage]
    return count


@njit(cache=True)
def sweep(program: Program, work: Work, network: Network, capacity: int) -> Swept:
    """Return the times of all rows and messages; `capacity` is at least the number of messages.

    Single compute rows with at most one stage on either side are timed here; everything else in `_step`.
    """
    rows, offset, placement = program.rows, program.offset, program.placement
    num_stages, num_slices, num_microbatches = placement.shape[1], program.num_slices, program.num_microbatches
    num_edges = len(program.edge_from)
    seconds, time_share, time_factor = work.seconds, work.time_share, work.time_factor
    state = _new_state(program, network, capacity)
    start_s, end_s, before, lane = state.start_s, state.end_s, state.before, state.lane
    arrived_forward, arrived_gradient, progress = state.arrived_forward, state.arrived_gradient, state.progress
    free_s, last, waits, stack, depth = state.free_s, state.last, state.waits, state.stack, state.depth
    edge_in = _only_edge(program.in_start, program.in_edge)
    edge_out = _only_edge(program.out_start, program.out_edge)
    position = offset[:-1].copy()
    simple_sends = network.overlap and not network.sends_are_rows
    while depth[0] > 0:
        depth[0] -= 1
        rank = stack[depth[0]]
        state.stacked[rank] = 0
        waits[rank] = _NOTHING
        index, stop = position[rank], offset[rank + 1]
        while index < stop:
            kind, stage, part = rows[index, KIND], rows[index, STAGE], rows[index, SLICE]
            simple = kind <= _W and rows[index, FUSED] != 1 and (num_slices == 1 or part >= 0) and network.plain
            if not simple or edge_in[stage] == _SEVERAL or edge_out[stage] == _SEVERAL:
                following = _step(program, work, network, state, rank, index)
                if following == index:
                    break
                index = following
                continue
            replica, microbatch, part = rows[index, REPLICA], rows[index, MICROBATCH], max(part, 0)
            own = ((replica * num_stages + stage) * num_microbatches + microbatch) * num_slices + part
            edge, node = -1, 0
            ready = free_s[rank]
            cause = last[rank]
            if kind == _F:
                edge = edge_in[stage]
                if edge >= 0:
                    key = ((replica * num_edges + edge) * num_microbatches + microbatch) * num_slices + part
                    node = arrived_forward[key]
                    if node == 0:
                        waits[rank] = 2 * key
                        break
            elif kind == _W:
                if progress[own] & _GRADIENT_DONE == 0:
                    waits[rank] = _FOREVER
                    break
            else:
                edge = edge_out[stage]
                if progress[own] & _FORWARD_DONE == 0:
                    waits[rank] = _FOREVER
                    break
                if edge >= 0:
                    key = ((replica * num_edges + edge) * num_microbatches + microbatch) * num_slices + part
                    node = arrived_gradient[key]
                    if node == 0:
                        waits[rank] = 2 * key + 1
                        break
            if node > 0 and end_s[node - 1] > ready:
                ready = end_s[node - 1]
                cause = node - 1
            start_s[index] = ready
            done = ready + seconds[kind, stage] * time_share[rows[index, SLICE] + 1] * time_factor[microbatch]
            end_s[index] = done
            before[index] = cause
            lane[index] = COMPUTE_LANE
            free_s[rank] = done
            last[rank] = index
            state.compute_start_s[rank] = ready
            if kind == _W:
                index += 1
                continue
            if kind == _F:
                progress[own] |= _FORWARD_DONE
                edge = edge_out[stage]
                other = program.edge_to[edge] if edge >= 0 else -1
            else:
                progress[own] |= _GRADIENT_DONE
                edge = edge_in[stage]
                other = program.edge_from[edge] if edge >= 0 else -1
            if edge >= 0:
                target = placement[replica, other]
                arrived = arrived_forward if kind == _F else arrived_gradient
                key = ((replica * num_edges + edge) * num_microbatches + microbatch) * num_slices + part
                wanted = 2 * key + (0 if kind == _F else 1)
                if target == rank:
                    arrived[key] = index + 1
                elif simple_sends:
                    arrived[key] = _send(work, network, state, rows, index, edge, rank, target, done, index) + 1
                    if waits[target] == wanted:
                        _push(state, target)
                elif not network.sends_are_rows:
                    _deliver(program, work, network, state, rank, index, kind == _F, False)
            index += 1
        position[rank] = index
        if state.queue_head[rank] < state.queue_tail[rank]:
            progressed = _run_collectives(program, work, network, state, rank)
            if progressed and waits[rank] == _LANE:
                _push(state, rank)
    for rank in range(len(position)):
        if state.queue_head[rank] < state.queue_tail[rank]:
            position[rank] = min(position[rank], state.queue[offset[rank] + state.queue_head[rank]])
    return Swept(
        start_s,
        end_s,
        lane,
        before,
        state.message_row,
        state.message_edge,
        state.message_bytes,
        state.num_messages[0],
        position,
        free_s,
        last,
        arrived_forward,
        arrived_gradient,
    )


@njit(cache=True)
def _only_edge(start: Ints, edge: Ints) -> Ints:
    """Return the one edge of each stage on that side, -1 for none, _SEVERAL for more."""
    only = np.full(len(start) - 1, -1, dtype=np.int32)
    for stage in range(len(only)):
        if start[stage + 1] - start[stage] == 1:
            only[stage] = edge[start[stage]]
        elif start[stage + 1] - start[stage] > 1:
            only[stage] = _SEVERAL
    return only


@njit(cache=True, inline="always")
def _send(
    work: Work,
    network: Network,
    state: _State,
    rows: Ints,
    index: int,
    edge: int,
    rank: int,
    target: int,
    ready_s: float,
    cause: int,
) -> int:
    """Put one message on the link and return the node that brings it: the message, or `cause` when it takes no time."""
    kind = rows[index, KIND]
    forward = kind in (_F, _SEND_F)
    size = network.forward_bytes[edge] if forward else network.gradient_bytes[edge]
    size *= work.size_share[rows[index, SLICE] + 1] * work.size_factor[rows[index, MICROBATCH]]
    occupied_s = size * network.second_per_byte[rank, target]
    latency_s = network.latency_s[rank, target]
    message = state.num_messages[0]
    state.num_messages[0] = message + 1
    node = len(rows) + message
    state.message_row[message] = index
    state.message_edge[message] = edge
    state.message_bytes[message] = size
    start = ready_s
    state.before[node] = cause
    if occupied_s > 0.0:
        if state.link_free_s[rank, target] > start:
            start = state.link_free_s[rank, target]
            state.before[node] = state.link_last[rank, target]
        state.link_free_s[rank, target] = start + occupied_s
        state.link_last[rank, target] = node
    state.start_s[node] = start
    state.end_s[node] = start + latency_s + occupied_s
    return cause if latency_s + occupied_s == 0.0 else node


@njit(cache=True)
def _new_state(program: Program, network: Network, capacity: int) -> _State:
    num_rows, num_ranks = len(program.rows), len(program.offset) - 1
    num_replicas, num_stages = program.placement.shape
    per_stage = program.num_microbatches * program.num_slices
    num_keys = num_replicas * num_stages * per_stage
    num_edge_keys = max(num_replicas * len(program.edge_from) * per_stage, 1)
    has_collectives = np.any(program.rows[:, KIND] >= _UNSHARD) if num_rows else False
    queued = num_rows if has_collectives else 1
    moved_keys = num_keys if network.has_moves else 1
    stack = np.arange(num_ranks - 1, -1, -1).astype(np.int32)
    return _State(
        np.zeros(num_rows + capacity),
        np.full(num_rows + capacity, -1.0),
        np.full(num_rows + capacity, -1, dtype=np.int32),
        np.full(num_rows, -1, dtype=np.int8),
        np.empty(capacity, dtype=np.int32),
        np.empty(capacity, dtype=np.int32),
        np.empty(capacity),
        np.zeros(1, dtype=np.int32),
        np.zeros(num_edge_keys, dtype=np.int32),
        np.zeros(num_edge_keys, dtype=np.int32),
        np.zeros(num_keys, dtype=np.uint8),
        np.zeros(moved_keys, dtype=np.int32),
        np.zeros(num_ranks),
        np.full(num_ranks, -1, dtype=np.int32),
        np.zeros(num_ranks),
        np.full(num_ranks, _NOTHING, dtype=np.int64),
        np.zeros((num_ranks, num_ranks)),
        np.full((num_ranks, num_ranks), -1, dtype=np.int32),
        np.zeros((num_ranks, 5)),
        np.full((num_ranks, 5), -1, dtype=np.int32),
        np.zeros(queued, dtype=np.int32),
        np.zeros(num_ranks, dtype=np.int32),
        np.zeros(num_ranks, dtype=np.int32),
        np.zeros(queued),
        np.zeros(queued, dtype=np.int32),
        np.zeros((2, num_replicas * num_stages), dtype=np.int32),
        np.zeros(num_stages, dtype=np.int32),
        np.zeros(num_ranks, dtype=np.uint8),
        stack,
        np.full(1, num_ranks, dtype=np.int32),
        np.ones(num_ranks, dtype=np.uint8),
    )


@njit(cache=True, inline="always")
def _push(state: _State, rank: int) -> None:
    state.waits[rank] = _NOTHING
    if state.stacked[rank] == 0:
        state.stacked[rank] = 1
        state.stack[state.depth[0]] = rank
        state.depth[0] += 1


@njit(cache=True)
def _step(program: Program, work: Work, network: Network, state: _State, rank: int, index: int) -> int:
    """Time the row at `index`, or the fused group it opens; return the row after it, or `index` when it must wait."""
    kind, replica, stage = program.rows[index, KIND], program.rows[index, REPLICA], program.rows[index, STAGE]
    if kind <= _R or kind == _FILL:
        return int(_compute(program, work, network, state, rank, index))
    if kind in (_SEND_F, _SEND_B):
        if not _has_progress(program, state, index, _FORWARD_DONE if kind == _SEND_F else _GRADIENT_DONE):
            state.waits[rank] = _FOREVER
            return index
        _deliver(program, work, network, state, rank, index, kind == _SEND_F, True)
    elif kind in (_OFFLOAD, _RELOAD, _EVICT, _LOAD):
        return int(_move(program, work, network, state, rank, index))
    elif kind == _RESHARD:
        state.start_s[index] = state.free_s[rank]
        state.end_s[index] = state.free_s[rank]
        state.pending[0, replica * program.placement.shape[1] + stage] = 0
    elif kind == _OPT:
        reduction = state.pending[1, replica * program.placement.shape[1] + stage] - 1
        ready, cause = state.free_s[rank], state.last[rank]
        if reduction >= 0:
            if state.end_s[reduction] < 0:
                state.waits[rank] = _LANE
                return index
            if state.end_s[reduction] > ready:
                ready, cause = state.end_s[reduction], reduction
        _occupy(state, rank, index, ready, ready + work.seconds[kind, stage], cause)
    elif kind in (_UNSHARD, _REDUCE_GRAD):
        return int(_issue(program, network, state, rank, index))
    return index + 1


@njit(cache=True)
def _occupy(state: _State, rank: int, index: int, start_s: float, end_s: float, cause: int) -> None:
    """Give the row its span on the rank's compute lane."""
    state.start_s[index] = start_s
    state.end_s[index] = end_s
    state.before[index] = cause
    state.lane[index] = COMPUTE_LANE
    state.free_s[rank] = end_s
    state.last[rank] = index
    state.compute_start_s[rank] = start_s


@njit(cache=True)
def _slots(program: Program, index: int) -> tuple[int, int]:
    part = program.rows[index, SLICE]
    return (0, program.num_slices) if part < 0 else (part, part + 1)


@njit(cache=True)
def _own_key(program: Program, index: int) -> int:
    rows, num_stages = program.rows, program.placement.shape[1]
    cell = rows[index, REPLICA] * num_stages + rows[index, STAGE]
    return int((cell * program.num_microbatches + rows[index, MICROBATCH]) * program.num_slices)


@njit(cache=True)
def _edge_key(program: Program, index: int, edge: int) -> int:
    rows = program.rows
    cell = rows[index, REPLICA] * len(program.edge_from) + edge
    return int((cell * program.num_microbatches + rows[index, MICROBATCH]) * program.num_slices)


@njit(cache=True)
def _has_progress(program: Program, state: _State, index: int, bit: int) -> bool:
    key = _own_key(program, index)
    low, high = _slots(program, index)
    for slot in range(low, high):  # noqa: SIM110
        if state.progress[key + slot] & bit == 0:
            return False
    return True


@njit(cache=True)
def _compute(program: Program, work: Work, network: Network, state: _State, rank: int, index: int) -> int:
    """Time a compute row, or the rows of a fused group as one action; return the row after, or `index` when it waits."""
    rows = program.rows
    after = index + 1
    while rows[after - 1, FUSED] == 1 and after < program.offset[rank + 1]:
        after += 1
    ready, cause = state.free_s[rank], state.last[rank]
    duration = 0.0
    for row in range(index, after):
        time, node = _arrival(program, network, state, rank, row)
        if time < 0.0:
            return index
        if time > ready:
            ready, cause = time, node
        duration += _seconds(work, rows, row)
    if after - index == 2:
        duration = _fused_seconds(work, rows, index, duration)
    for row in range(index, after):
        _occupy(state, rank, row, ready, ready + duration, cause)
        kind = rows[row, KIND]
        if kind <= _I:
            key = _own_key(program, row)
            low, high = _slots(program, row)
            for slot in range(low, high):
                state.progress[key + slot] |= _FORWARD_DONE if kind == _F else _GRADIENT_DONE
    for row in range(index, after):
        if rows[row, KIND] <= _I:
            _deliver(program, work, network, state, rank, row, rows[row, KIND] == _F, False)
    return after


@njit(cache=True)
def _seconds(work: Work, rows: Ints, index: int) -> float:
    kind, microbatch = rows[index, KIND], rows[index, MICROBATCH]
    if kind == _FILL:
        return float(work.fill_s[microbatch])
    whole = work.seconds[kind, rows[index, STAGE]]
    return float(whole * work.time_share[rows[index, SLICE] + 1] * work.time_factor[microbatch])


@njit(cache=True)
def _fused_seconds(work: Work, rows: Ints, index: int, separate_s: float) -> float:
    """Return the seconds of a fused pair: the overlap table's, scaled as the pair's own seconds are, or their sum."""
    forward, backward = (index, index + 1) if rows[index, KIND] == _F else (index + 1, index)
    if rows[forward, KIND] != _F or rows[backward, KIND] not in (_B, _I, _W):
        return separate_s
    table = work.overlap_s[rows[forward, STAGE], rows[backward, STAGE]]
    if np.isnan(table):
        return separate_s
    whole = work.seconds[_F, rows[forward, STAGE]] + work.seconds[rows[backward, KIND], rows[backward, STAGE]]
    return float(table * separate_s / whole)


@njit(cache=True)
def _arrival(program: Program, network: Network, state: _State, rank: int, index: int) -> tuple[float, int]:
    """Return (time, node) of the last thing the row waits for, or (-1, -1) with the rank's wait noted."""
    rows, kind, stage = program.rows, program.rows[index, KIND], program.rows[index, STAGE]
    low, high = _slots(program, index)
    latest, cause = 0.0, -1
    if kind in (_B, _I, _R) and not _has_progress(program, state, index, _FORWARD_DONE):
        state.waits[rank] = _FOREVER
        return -1.0, -1
    if kind == _W and not _has_progress(program, state, index, _GRADIENT_DONE):
        state.waits[rank] = _FOREVER
        return -1.0, -1
    if kind in (_F, _B, _I):
        gather = state.pending[0, rows[index, REPLICA] * program.placement.shape[1] + stage] - 1
        if gather >= 0:
            if state.end_s[gather] < 0:
                state.waits[rank] = _LANE
                return -1.0, -1
            latest, cause = state.end_s[gather], gather
        forward = kind == _F
        start, stop = program.in_start[stage], program.in_start[stage + 1]
        if not forward:
            start, stop = program.out_start[stage], program.out_start[stage + 1]
        arrived = state.arrived_forward if forward else state.arrived_gradient
        for place in range(start, stop):
            edge = program.in_edge[place] if forward else program.out_edge[place]
            key = _edge_key(program, index, edge)
            for slot in range(low, high):
                node = arrived[key + slot] - 1
                if node < 0:
                    state.waits[rank] = 2 * (key + slot) + (0 if forward else 1)
                    return -1.0, -1
                if state.end_s[node] > latest:
                    latest, cause = state.end_s[node], node
    if kind in (_B, _I, _R) and network.has_moves:
        key = _own_key(program, index)
        for slot in range(low, high):
            if state.progress[key + slot] & _AWAY:
                if state.progress[key + slot] & _RETURNED == 0:
                    state.waits[rank] = _FOREVER
                    return -1.0, -1
                node = state.back[key + slot] - 1
                if state.end_s[node] > latest:
                    latest, cause = state.end_s[node], node
    return latest, cause


@njit(cache=True)
def _deliver(
    program: Program, work: Work, network: Network, state: _State, rank: int, index: int, forward: bool, as_row: bool
) -> None:
    """Bring the row's output over each stage edge, by a message where it crosses ranks, and wake who waits for it."""
    rows, placement = program.rows, program.placement
    replica, stage = rows[index, REPLICA], rows[index, STAGE]
    low, high = _slots(program, index)
    arrived = state.arrived_forward if forward else state.arrived_gradient
    start, stop = program.out_start[stage], program.out_start[stage + 1]
    if not forward:
        start, stop = program.in_start[stage], program.in_start[stage + 1]
    for place in range(start, stop):
        edge = program.out_edge[place] if forward else program.in_edge[place]
        target = placement[replica, program.edge_to[edge] if forward else program.edge_from[edge]]
        node = index
        if target == rank:
            if as_row:
                continue
        else:
            if network.sends_are_rows and not as_row:
                continue
            late = as_row or not network.overlap
            ready, cause = (state.free_s[rank], state.last[rank]) if late else (state.end_s[index], index)
            node = _send(work, network, state, rows, index, edge, rank, target, ready, cause)
            if not network.overlap and state.end_s[node] > state.free_s[rank]:
                state.free_s[rank] = state.end_s[node]
                state.last[rank] = node
        key = _edge_key(program, index, edge)
        for slot in range(low, high):
            arrived[key + slot] = node + 1
        wanted = state.waits[target]
        if wanted >= 0 and (wanted & 1) == (0 if forward else 1) and key + low <= wanted >> 1 < key + high:
            _push(state, target)


@njit(cache=True)
def _move(program: Program, work: Work, network: Network, state: _State, rank: int, index: int) -> int:
    """Time an EVICT, LOAD, OFFLOAD or RELOAD on its lane; return the row after, or `index` when it can never run.

    Away: once the list gets there and the lane is free. Back: as soon as the compute row before it starts, so that the
    transfer runs under it.
    """
    rows, kind = program.rows, program.rows[index, KIND]
    away, to_host = kind in (_EVICT, _OFFLOAD), kind in (_OFFLOAD, _RELOAD)
    key = _own_key(program, index)
    low, high = _slots(program, index)
    ready, cause = state.free_s[rank], state.last[rank]
    if not away:
        ready = state.compute_start_s[rank]
        cause = state.before[cause] if cause >= 0 else -1
    for slot in range(low, high):
        bits = state.progress[key + slot]
        if bits & _FORWARD_DONE == 0 or (not away and bits & _AWAY == 0):
            state.waits[rank] = _FOREVER
            return index
        if not away and state.end_s[state.back[key + slot] - 1] > ready:
            cause = state.back[key + slot] - 1
            ready = state.end_s[cause]
    side = (1 if away else 2) + (2 if to_host else 0)
    if state.side_free_s[rank, side] > ready:
        ready, cause = state.side_free_s[rank, side], state.side_last[rank, side]
    size = work.activation[rows[index, STAGE]]
    size *= work.size_share[rows[index, SLICE] + 1] * work.size_factor[rows[index, MICROBATCH]]
    occupied_s = size * (network.host_second_per_byte if to_host else network.peer_second_per_byte)
    latency_s = network.host_latency_s if to_host else network.peer_latency_s
    state.start_s[index] = ready
    state.end_s[index] = ready + latency_s + occupied_s
    state.before[index] = cause
    state.lane[index] = HOST_LANE if to_host else SEND_LANE
    state.side_free_s[rank, side] = ready + occupied_s
    state.side_last[rank, side] = index
    for slot in range(low, high):
        state.back[key + slot] = index + 1
        if away:
            state.progress[key + slot] = (state.progress[key + slot] | _AWAY) & ~_RETURNED
        else:
            state.progress[key + slot] |= _RETURNED
    return index + 1


@njit(cache=True)
def _issue(program: Program, network: Network, state: _State, rank: int, index: int) -> int:
    """Hand a collective to the rank's lane; return the row after, or `index` while compute must wait for it."""
    rows, offset = program.rows, program.offset[rank]
    kind, tail = rows[index, KIND], state.queue_tail[rank]
    if tail == 0 or state.queue[offset + tail - 1] != index:
        ready, cause = state.free_s[rank], state.last[rank]
        if kind == _UNSHARD and network.collectives_overlap:
            ready = state.compute_start_s[rank]
            cause = state.before[cause] if cause >= 0 else -1
        state.issue_s[index] = ready
        state.issue_last[index] = cause
        state.queue[offset + tail] = index
        state.queue_tail[rank] = tail + 1
        place = 0 if kind == _UNSHARD else 1
        state.pending[place, rows[index, REPLICA] * program.placement.shape[1] + rows[index, STAGE]] = index + 1
    if not network.collectives_overlap:
        if state.end_s[index] < 0.0:
            state.waits[rank] = _LANE
            return index
        state.free_s[rank] = max(state.free_s[rank], state.end_s[index])
        state.last[rank] = index
    return index + 1


@njit(cache=True)
def _run_collectives(program: Program, work: Work, network: Network, state: _State, rank: int) -> bool:
    """Time the rank's issued collectives in order until one waits for another rank; return whether any got its time."""
    rows, progressed = program.rows, False
    while state.queue_head[rank] < state.queue_tail[rank]:
        if state.joining[rank]:
            break
        index = state.queue[program.offset[rank] + state.queue_head[rank]]
        ready, cause = state.issue_s[index], state.issue_last[index]
        if state.side_free_s[rank, 0] > ready:
            ready, cause = state.side_free_s[rank, 0], state.side_last[rank, 0]
        state.start_s[index] = ready
        state.before[index] = cause
        if network.joint and rows[index, KIND] == _REDUCE_GRAD:
            state.joining[rank] = 1
            progressed = _join(program, work, state, rank, rows[index, STAGE]) or progressed
        else:
            _end_collective(program, work, state, rank, ready, cause)
            progressed = True
    return progressed


@njit(cache=True)
def _end_collective(program: Program, work: Work, state: _State, rank: int, start_s: float, cause: int) -> None:
    index = state.queue[program.offset[rank] + state.queue_head[rank]]
    state.start_s[index] = start_s
    state.before[index] = cause
    state.end_s[index] = start_s + work.seconds[program.rows[index, KIND], program.rows[index, STAGE]]
    state.lane[index] = COLLECTIVE_LANE
    state.side_free_s[rank, 0] = state.end_s[index]
    state.side_last[rank, 0] = index
    state.queue_head[rank] += 1
    state.joining[rank] = 0


@njit(cache=True)
def _join(program: Program, work: Work, state: _State, rank: int, stage: int) -> bool:
    """Count the rank in; when it is the last member of the stage's reduction, end it for all of them."""
    placement = program.placement
    state.joined[stage] += 1
    ranks = np.unique(placement[:, stage])
    if state.joined[stage] < len(ranks):
        return False
    latest, cause = -1.0, -1
    for member in ranks:
        index = state.queue[program.offset[member] + state.queue_head[member]]
        if state.start_s[index] > latest:
            latest, cause = state.start_s[index], state.before[index]
    for member in ranks:
        _end_collective(program, work, state, member, latest, cause)
        if member != rank:
            _push(state, member)
    state.joined[stage] = 0
    return True
