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
    """Return the spans of a swept chain."""
    tails = _tail_actions(schedule)
    if not len(swept.message_row) and not tail_s.any():
        num_rows = len(program.rows)
        rank = np.repeat(np.arange(schedule.num_ranks, dtype=np.int32), np.diff(program.offset))
        end_s = swept.end_s[:num_rows]
        path = _row_path(swept.before, int(np.argmax(end_s))) if trace and num_rows else np.zeros(0, np.int32)
        return Spans(rank, np.zeros(num_rows, np.int32), program.rows, swept.start_s[:num_rows], end_s, path)
    packed = np.ascontiguousarray(program.rows).view(np.int64)  # a row of six columns in three words
    return Spans(*_chain_spans(program, packed, swept, tail_s, tails, trace))


def _tail_actions(schedule: Schedule) -> Ints:
    """Return, for each rank, an optimizer step of the first stage it holds."""
    actions = np.full((schedule.num_ranks, 6), -1, dtype=np.int32)
    actions[:, KIND], actions[:, FUSED] = int(Kind.OPT), 0
    for replica in range(schedule.num_replicas - 1, -1, -1):
        for stage in range(schedule.num_stages - 1, -1, -1):
            actions[schedule.placement[replica, stage], [REPLICA, STAGE]] = replica, stage
    return actions


@njit(cache=True)
def _row_path(before: Ints, node: int) -> Ints:
    length, at = 0, node
    while at >= 0:
        length, at = length + 1, before[at]
    path = np.empty(length, np.int32)
    for place in range(length - 1, -1, -1):
        path[place] = node
        node = before[node]
    return path


@njit(cache=True)
def _chain_spans(
    program: Program, packed: npt.NDArray[np.int64], swept: Swept, tail_s: Floats, tails: Ints, trace: bool
) -> tuple[Ints, Ints, Ints, Floats, Floats, Ints]:
    rows, offset, sent = program.rows, program.offset, swept.message_first
    num_rows, num_ranks = len(rows), len(offset) - 1
    count = num_rows + len(swept.message_row) + np.count_nonzero(tail_s)
    rank_of, lane_of = np.empty(count, np.int32), np.empty(count, np.int32)
    words = np.empty((count, 3), np.int64)
    action = words.view(np.int32)
    start_s, end_s = np.empty(count), np.empty(count)
    first_span, first_sent = np.empty(num_ranks + 1, np.int32), np.empty(num_ranks, np.int32)
    order = np.empty(0, np.int64)  # messages by start, where a rank's links overtake each other
    span, latest, last_node, last_tail = 0, -1.0, -1, -1
    for rank in range(num_ranks):
        first_span[rank] = span
        for row in range(offset[rank], offset[rank + 1]):
            lane_of[span] = COMPUTE_LANE
            for word in range(3):
                words[span, word] = packed[row, word]
            start_s[span], end_s[span] = swept.start_s[row], swept.end_s[row]
            span += 1
        ended = end_s[span - 1] if offset[rank + 1] > offset[rank] else 0.0
        last, tail = offset[rank + 1] - 1 if offset[rank + 1] > offset[rank] else -1, -1
        if tail_s[rank] > 0.0:
            action[span], lane_of[span] = tails[rank], COMPUTE_LANE
            start_s[span], end_s[span] = ended, ended + tail_s[rank]
            ended, tail = end_s[span], span
            span += 1
        if ended > latest:
            latest, last_node, last_tail = ended, last, tail
        first_sent[rank], in_order = span, True
        for message in range(sent[rank], sent[rank + 1]):
            row = swept.message_row[message]
            lane_of[span] = SEND_LANE
            for word in range(3):
                words[span, word] = packed[row, word]
            action[span, KIND] = _SEND_F if rows[row, KIND] == _F else _SEND_B
            start_s[span], end_s[span] = swept.start_s[num_rows + message], swept.end_s[num_rows + message]
            in_order = in_order and (message == sent[rank] or start_s[span - 1] <= start_s[span])
            span += 1
        if not in_order:
            part = np.argsort(start_s[first_sent[rank] : span], kind="mergesort")
            start_s[first_sent[rank] : span] = start_s[first_sent[rank] : span][part]
            end_s[first_sent[rank] : span] = end_s[first_sent[rank] : span][part]
            action[first_sent[rank] : span] = action[first_sent[rank] : span][part]
            if not len(order):
                order = np.arange(len(swept.message_row))
            order[sent[rank] + part] = np.arange(sent[rank], sent[rank + 1])
        for place in range(first_span[rank], span):
            rank_of[place] = rank
    path = np.empty(count if trace else 0, np.int32)
    length, node, rank = 0, last_node, 0
    if trace and last_tail >= 0:
        path[0], length = last_tail, 1
    while trace and node >= 0:
        bounds = offset if node < num_rows else sent
        at = node if node < num_rows else node - num_rows
        while at >= bounds[rank + 1]:
            rank += 1
        while at < bounds[rank]:
            rank -= 1
        if node < num_rows:
            path[length] = first_span[rank] + at - offset[rank]
        else:
            path[length] = first_sent[rank] + (order[at] if len(order) else at) - sent[rank]
        length, node = length + 1, swept.before[node]
    return rank_of, lane_of, action, start_s, end_s, path[:length][::-1].copy()


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
