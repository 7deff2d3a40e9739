"""The event times of a compute-only schedule on a chain of stages: one longest-path sweep, as fast as memory allows.

Compute of a rank and each directed link serve their work in an order that the rank's own list fixes, because whatever a
rank sends, it sends in program order. Then event times are max-plus expressions of each other,

    start(x) = max over x's predecessors (list, message, link) of end,      end(x) = start(x) + duration(x)

and need no event queue: ranks that can go on are on a stack, each runs until its next row waits for something that has
no time yet. O(N + M) for N rows and M messages. Every node remembers the predecessor that set its start, from which the
critical path is traced. Nodes are numbered as a timeline lists its spans, so that nothing is copied afterwards: rank by
rank its rows, its tail if it has one, its messages in list order.

It takes F, B, I and W, slices and replicas, sends beside compute; `event_graph` takes everything else, and agrees.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, STAGE
from stagewright.planner.simulation.program import Program

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

_F, _I, _W = int(Kind.F), int(Kind.I), int(Kind.W)
_FORWARD_DONE, _GRADIENT_DONE = 1, 2  # bits of a key's progress


class Hops(NamedTuple):
    """Where the output of each stage edge goes, [2, num_replicas * num_edges]: forwards in row 0, gradients in row 1.

    `target` is the rank, `link` the directed pair's number, -1 where both stages are on one rank; a message of a whole
    microbatch has `size` bytes, occupies the link for `occupied_s` and arrives `latency_s` after that.
    """

    target: Ints
    link: Ints
    latency_s: Floats
    occupied_s: Floats
    size: Floats
    num_links: int


class Nodes(NamedTuple):
    """Numbers of the nodes: rank r has its rows from `first_row[r]` on, then its tail, then its messages.

    `first_row` is [num_ranks + 1], its last entry the number of nodes; `first_message` is [num_ranks].
    """

    first_row: Ints
    first_message: Ints


class Columns(NamedTuple):
    """The columns of a timeline's spans, by node, to be filled."""

    start_s: Floats
    end_s: Floats
    action: Ints
    rank: Ints
    lane: Ints


def empty_columns(num_nodes: int) -> Columns:
    """Return columns in one piece of memory.

    A large piece is mapped in large pages, and freed ones are used again; fresh small pages would cost as much as the sweep.
    """
    words = np.empty(6 * num_nodes)
    start_s, end_s = words[:num_nodes], words[num_nodes : 2 * num_nodes]
    action = words[2 * num_nodes : 5 * num_nodes].view(np.int32).reshape(num_nodes, 6)
    rank, lane = words[5 * num_nodes :].view(np.int32).reshape(2, num_nodes)
    return Columns(start_s, end_s, action, rank, lane)


class Swept(NamedTuple):
    """Times of all nodes, and where each rank stopped (its end, unless the schedule deadlocks).

    `before` is the node that set a node's start, -1 for none. `message_row` [num_nodes] is the row that caused a message,
    undefined for other nodes. `arrived` holds, [2, num_edge_keys], the node that brought it, + 1.
    """

    nodes: Nodes
    columns: Columns
    before: Ints
    message_row: Ints
    message_bytes: float
    position: Ints
    arrived: Ints


def is_chain(program: Program) -> bool:
    """Return whether the sweep takes the schedule: plain F, B, I, W, one stage before and after each, no fused rows."""
    degrees = np.concatenate((np.diff(program.in_start), np.diff(program.out_start)))
    whole_of_slices = program.num_slices > 1 and bool((program.rows[:, SLICE] < 0).any())
    only_compute = not program.kind_counts[_W + 1 :].any()
    return only_compute and not program.has_fused and not whole_of_slices and int(degrees.max(initial=0)) <= 1


@njit(cache=True)
def sweep_chain(
    program: Program,
    hops: Hops,
    seconds: Floats,
    time_share: Floats,
    time_factor: Floats,
    size_share: Floats,
    size_factor: Floats,
    scaled: bool,
    nodes: Nodes,
    columns: Columns,
) -> Swept:
    """Return the times of all rows and messages, written into `columns`; those of tails are left open.

    `seconds` is [num_kinds, num_stages]; `time_share` and `size_share` are [num_slices + 1], whole microbatches at 0;
    the factors are [num_microbatches]; not `scaled` says that shares and factors are all 1.
    """
    rows, offset = program.rows, program.offset
    num_ranks = len(offset) - 1
    num_replicas, num_stages = program.placement.shape
    num_microbatches, num_slices = program.num_microbatches, program.num_slices
    num_edges = len(program.edge_from)
    edge_in, edge_out = np.full(num_stages, -1, np.int32), np.full(num_stages, -1, np.int32)
    for edge in range(num_edges):
        edge_in[program.edge_to[edge]], edge_out[program.edge_from[edge]] = edge, edge
    num_nodes = nodes.first_row[-1]
    start_s, end_s = columns.start_s, columns.end_s
    before, message_row = np.empty(num_nodes, np.int32), np.empty(num_nodes, np.int32)
    next_message = nodes.first_message.copy()
    arrived = np.zeros((2, max(num_replicas * num_edges * num_microbatches * num_slices, 1)), np.int32)
    progress = np.zeros(num_replicas * num_stages * num_microbatches * num_slices, np.uint8)
    link_free_s, link_last = np.zeros(hops.num_links + 1), np.zeros(hops.num_links + 1, np.int32)
    free_s, last = np.zeros(num_ranks), np.full(num_ranks, -1, np.int32)
    waits = np.full(num_ranks, -1, np.int64)  # 2 * edge key + direction that a stopped rank waits for
    position = offset[:-1].copy()
    stack = np.empty(num_ranks + 1, np.int32)
    for rank in range(num_ranks):
        stack[num_ranks - 1 - rank] = rank
    depth, total_bytes = num_ranks, 0.0
    while depth > 0:
        depth -= 1
        rank = stack[depth]
        waits[rank] = -1
        index, stop = position[rank], offset[rank + 1]
        ready, cause = free_s[rank], last[rank]
        shift = nodes.first_row[rank] - offset[rank]
        while index < stop:
            kind, replica, stage = rows[index, KIND], rows[index, REPLICA], rows[index, STAGE]
            microbatch, part = rows[index, MICROBATCH], max(rows[index, SLICE], 0)
            own = ((replica * num_stages + stage) * num_microbatches + microbatch) * num_slices + part
            way, edge, onward = (
                (0, edge_in[stage], edge_out[stage]) if kind == _F else (1, edge_out[stage], edge_in[stage])
            )
            start = ready
            if kind == _W:
                if progress[own] & _GRADIENT_DONE == 0:
                    break
                onward = -1
            else:
                if kind != _F and progress[own] & _FORWARD_DONE == 0:
                    break
                if edge >= 0:
                    key = ((replica * num_edges + edge) * num_microbatches + microbatch) * num_slices + part
                    node = arrived[way, key]
                    if node == 0:
                        waits[rank] = 2 * key + way
                        break
                    if end_s[node - 1] > start:
                        start, cause = end_s[node - 1], node - 1
            duration = seconds[kind, stage]
            if scaled:
                duration *= time_share[rows[index, SLICE] + 1] * time_factor[microbatch]
            own_node = index + shift
            start_s[own_node], before[own_node] = start, cause
            ready, cause = start + duration, own_node
            end_s[own_node] = ready
            if kind != _W:
                progress[own] |= _FORWARD_DONE if kind == _F else _GRADIENT_DONE
            if onward >= 0:
                cell = replica * num_edges + onward
                target, node = hops.target[way, cell], own_node
                if target >= 0:
                    occupied, latency, size = (
                        hops.occupied_s[way, cell],
                        hops.latency_s[way, cell],
                        hops.size[way, cell],
                    )
                    if scaled:
                        share = size_share[rows[index, SLICE] + 1] * size_factor[microbatch]
                        occupied, size = occupied * share, size * share
                    total_bytes += size
                    if occupied + latency > 0.0:
                        node = next_message[rank]
                        next_message[rank] = node + 1
                        message_row[node] = index
                        start_s[node], before[node] = ready, own_node
                        if occupied > 0.0:
                            link = hops.link[way, cell]
                            if link_free_s[link] > ready:
                                start_s[node], before[node] = link_free_s[link], link_last[link]
                            link_free_s[link], link_last[link] = start_s[node] + occupied, node
                        end_s[node] = start_s[node] + occupied + latency
                key = (cell * num_microbatches + microbatch) * num_slices + part
                arrived[way, key] = node + 1
                if target >= 0 and waits[target] == 2 * key + way:
                    waits[target] = -1
                    stack[depth] = target
                    depth += 1
            index += 1
        position[rank], free_s[rank], last[rank] = index, ready, cause
    return Swept(nodes, columns, before, message_row, total_bytes, position, arrived)


@njit(cache=True)
def number_nodes(program: Program, hops: Hops, has_tail: npt.NDArray[np.bool_]) -> Nodes:
    """Return the nodes of a chain's rows, of the tails of the ranks that have one, and of the messages that take time."""
    rows, offset = program.rows, program.offset
    num_stages, num_edges = program.placement.shape[1], len(program.edge_from)
    num_replicas = program.placement.shape[0]
    sends = np.zeros((3, num_replicas * num_stages), np.int32)  # F, B, I by (replica, stage)
    for replica in range(num_replicas):
        for edge in range(num_edges):
            cell = replica * num_edges + edge
            if hops.occupied_s[0, cell] + hops.latency_s[0, cell] > 0.0:
                sends[_F, replica * num_stages + program.edge_from[edge]] += 1
            if hops.occupied_s[1, cell] + hops.latency_s[1, cell] > 0.0:
                for kind in range(1, 3):
                    sends[kind, replica * num_stages + program.edge_to[edge]] += 1
    first_row, first_message = np.zeros(len(offset), np.int32), np.zeros(len(offset) - 1, np.int32)
    for rank in range(len(offset) - 1):
        count = 0
        for index in range(offset[rank], offset[rank + 1]):
            if rows[index, KIND] != _W:
                count += sends[rows[index, KIND], rows[index, REPLICA] * num_stages + rows[index, STAGE]]
        first_message[rank] = first_row[rank] + offset[rank + 1] - offset[rank] + has_tail[rank]
        first_row[rank + 1] = first_message[rank] + count
    return Nodes(first_row, first_message)
