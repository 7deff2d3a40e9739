"""From simulated nodes to a timeline's spans, sorted by (rank, lane, start), with the critical path.

The critical path starts at the last end (the lowest rank, when several end together) and follows, from node to node,
the predecessor that set its start. O(N + M), plus a sort of the lanes that are not in order already.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import FUSED, KIND, REPLICA, STAGE, Schedule
from stagewright.planner.simulation.chain_sweep import Swept
from stagewright.planner.simulation.event_graph import Solved
from stagewright.planner.simulation.program import Program
from stagewright.planner.simulation.timeline import COMPUTE_LANE, SEND_LANE

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

_F, _SEND_F, _SEND_B = int(Kind.F), int(Kind.SEND_F), int(Kind.SEND_B)


class Spans(NamedTuple):
    """Columns of a `Timeline`, and the critical path as indices into them."""

    rank: Ints
    lane: Ints
    action: Ints
    start_s: Floats
    end_s: Floats
    critical_path: Ints


def chain_spans(schedule: Schedule, program: Program, swept: Swept, tail_s: Floats, *, trace: bool) -> Spans:
    """Return the spans of a swept chain, whose nodes stand in their order already; `swept`'s arrays become theirs."""
    packed = np.ascontiguousarray(program.rows).view(np.int64)  # a row of six columns in three words
    last, place = _fill(program, packed, swept, swept.columns.action.view(np.int64), tail_s, _tail_actions(schedule))
    path = _path(swept.before, last) if trace else np.zeros(0, np.int32)
    start_s, end_s, action, rank, lane = swept.columns
    return Spans(rank, lane, action, start_s, end_s, place[path] if len(place) else path)


def _tail_actions(schedule: Schedule) -> Ints:
    """Return, for each rank, an optimizer step of the first stage it holds."""
    actions = np.full((schedule.num_ranks, 6), -1, dtype=np.int32)
    actions[:, KIND], actions[:, FUSED] = int(Kind.OPT), 0
    for replica in range(schedule.num_replicas - 1, -1, -1):
        for stage in range(schedule.num_stages - 1, -1, -1):
            actions[schedule.placement[replica, stage], [REPLICA, STAGE]] = replica, stage
    return actions


@njit(cache=True)
def _path(before: Ints, last: int) -> Ints:
    """Return the nodes of the longest path that ends in `last`."""
    length, node = 0, last
    while node >= 0:
        length, node = length + 1, before[node]
    path, node = np.empty(length, np.int32), last
    for place in range(length - 1, -1, -1):
        path[place] = node
        node = before[node]
    return path


@njit(cache=True)
def _fill(
    program: Program,
    packed: npt.NDArray[np.int64],
    swept: Swept,
    words: npt.NDArray[np.int64],
    tail_s: Floats,
    tails: Ints,
) -> tuple[int, Ints]:
    """Fill the other columns; return the compute node that ends last and, where messages were sorted, each node's span.

    Tails get their times, and the messages of a rank whose links overtake each other are sorted by start. `packed` and
    `words` are the rows and the action column, three words a row.
    """
    rows, offset, nodes = program.rows, program.offset, swept.nodes
    start_s, end_s, action, rank_of, lane_of = swept.columns
    place = np.empty(0, np.int32)
    latest, last = -1.0, -1
    for rank in range(len(offset) - 1):
        first, node = nodes.first_row[rank], nodes.first_row[rank] + offset[rank + 1] - offset[rank]
        shift = offset[rank] - first
        for index in range(first, node):
            for word in range(3):
                words[index, word] = packed[index + shift, word]
        rank_of[first : nodes.first_row[rank + 1]] = rank
        lane_of[first : nodes.first_message[rank]] = COMPUTE_LANE
        lane_of[nodes.first_message[rank] : nodes.first_row[rank + 1]] = SEND_LANE
        if node < nodes.first_message[rank]:
            ended = end_s[node - 1] if node > first else 0.0
            for column in range(6):
                action[node, column] = tails[rank, column]
            swept.before[node] = node - 1 if node > first else -1
            start_s[node], end_s[node] = ended, ended + tail_s[rank]
            node += 1
        if node > first and end_s[node - 1] > latest:
            latest, last = end_s[node - 1], node - 1
        in_order, stop = True, nodes.first_row[rank + 1]
        for message in range(node, stop):
            row = swept.message_row[message]
            for word in range(3):
                words[message, word] = packed[row, word]
            action[message, KIND] = _SEND_F if rows[row, KIND] == _F else _SEND_B
            in_order = in_order and (message == node or start_s[message - 1] <= start_s[message])
        if not in_order:
            if not len(place):
                place = np.empty(len(start_s), np.int32)
                for span in range(len(place)):
                    place[span] = span
            _sort_by_start(start_s, end_s, words, place, node, stop)
    return last, place


@njit(cache=True, no_cpython_wrapper=True)
def _sort_by_start(
    start_s: Floats, end_s: Floats, words: npt.NDArray[np.int64], place: Ints, first: int, stop: int
) -> None:
    """Sort the spans [first, stop) by start, equal ones in their order, and note where each went (merge sort)."""
    count = stop - first
    order, merged = np.empty(count, np.int32), np.empty(count, np.int32)
    for index in range(count):
        order[index] = index
    width = 1
    while width < count:
        for low in range(0, count, 2 * width):
            left, middle = low, min(low + width, count)
            right, high = middle, min(low + 2 * width, count)
            for at in range(low, high):
                takes_left = left < middle and (
                    right >= high or start_s[first + order[left]] <= start_s[first + order[right]]
                )
                if takes_left:
                    merged[at] = order[left]
                    left += 1
                else:
                    merged[at] = order[right]
                    right += 1
        order, merged = merged, order
        width *= 2
    old_start_s, old_end_s, old_words = start_s[first:stop].copy(), end_s[first:stop].copy(), words[first:stop].copy()
    for at in range(count):
        source = order[at]
        start_s[first + at], end_s[first + at] = old_start_s[source], old_end_s[source]
        for word in range(3):
            words[first + at, word] = old_words[source, word]
        place[first + source] = first + at


def graph_spans(schedule: Schedule, program: Program, solved: Solved, tail_s: Floats, *, trace: bool) -> Spans:
    """Return the spans of a solved graph; those of a fused group divide its time by their own seconds."""
    num_ranks = schedule.num_ranks
    row_rank = np.repeat(np.arange(num_ranks), np.diff(program.offset))
    shown = np.flatnonzero(solved.row_node >= 0)
    ended = _last_compute(solved, row_rank, num_ranks)
    tailed = np.flatnonzero(tail_s > 0.0)
    sent = program.rows[solved.message_row].copy()
    forward = np.isin(sent[:, KIND], (_F, _SEND_F))
    sent[:, KIND], sent[:, FUSED] = np.where(forward, _SEND_F, _SEND_B), 0
    rank = np.concatenate((row_rank[shown], solved.message_rank, tailed))
    lane = np.concatenate((solved.row_lane[shown], np.full(len(sent), SEND_LANE), np.full(len(tailed), COMPUTE_LANE)))
    action = np.concatenate((program.rows[shown], sent, _tail_actions(schedule)[tailed]))
    start_s = np.concatenate((solved.row_start_s[shown], solved.start_s[solved.message_node], ended[0][tailed]))
    end_s = np.concatenate((solved.row_end_s[shown], solved.end_s[solved.message_node], (ended[0] + tail_s)[tailed]))
    num_nodes = len(solved.start_s)
    node = np.concatenate((solved.row_node[shown], solved.message_node, num_nodes + tailed))
    order = np.lexsort((np.arange(len(rank)), start_s, lane, rank))
    rank, lane, action, node = rank[order], lane[order], action[order], node[order]
    start_s, end_s = start_s[order], end_s[order]
    path = np.zeros(0, np.int32)
    if trace and len(order):
        path = _graph_path(solved, node, end_s, ended[1])
    return Spans(rank.astype(np.int32), lane.astype(np.int32), action, start_s, end_s, path)


def _last_compute(
    solved: Solved, row_rank: npt.NDArray[np.int64], num_ranks: int
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return when each rank's compute ends, and the node that ends it, -1 for an idle rank."""
    ended, node = np.zeros(num_ranks), np.full(num_ranks, -1, dtype=np.int64)
    compute = np.flatnonzero((solved.row_node >= 0) & (solved.row_lane == COMPUTE_LANE))
    node[row_rank[compute]] = solved.row_node[compute]  # rows are in order, the last one of a rank stays
    ended[node >= 0] = solved.end_s[node[node >= 0]]
    return ended, node


def _graph_path(
    solved: Solved, node_of_span: npt.NDArray[np.int64], end_s: Floats, last: npt.NDArray[np.int64]
) -> Ints:
    num_nodes = len(solved.start_s)
    span_of = np.full(num_nodes, -1, dtype=np.int64)
    own = node_of_span < num_nodes
    span_of[node_of_span[own][::-1]] = np.flatnonzero(own)[::-1]  # of several ranks in one reduction, the first
    final = int(np.argmax(end_s))
    path, node = [], int(node_of_span[final])
    if node >= num_nodes:
        path.append(final)
        node = int(last[node - num_nodes])
    while node >= 0:
        if span_of[node] >= 0:
            path.append(int(span_of[node]))
        node = int(solved.before[node])
    return np.array(path[::-1], dtype=np.int32)
