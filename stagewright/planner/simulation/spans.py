"""From the sweep's nodes to a timeline's spans, sorted by (rank, lane, start), with the critical path.

Compute spans of a rank are already in order; the other lanes are nearly so, and sorted where not. The critical path
starts at the last end (the lowest rank, when several end together) and follows, from node to node, the predecessor
that set its start. O(N + M), plus a sort of the lanes that need one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND, REPLICA, STAGE
from stagewright.planner.simulation.program import Program
from stagewright.planner.simulation.sweep import Swept
from stagewright.planner.simulation.timeline import COMPUTE_LANE, LANE_NAMES, SEND_LANE

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

_F, _SEND_F, _SEND_B, _OPT = int(Kind.F), int(Kind.SEND_F), int(Kind.SEND_B), int(Kind.OPT)
_NUM_LANES = len(LANE_NAMES)


@njit(cache=True)
def spans(program: Program, swept: Swept, tail_s: Floats, trace: bool) -> tuple[Ints, Ints, Ints, Floats, Floats, Ints]:
    """Return rank, lane, action, start, end of every span, and the critical path's spans in time order."""
    num_rows, num_ranks = len(program.rows), len(program.offset) - 1
    num_nodes = num_rows + swept.num_messages
    order, bounds = _order(program, swept, tail_s)
    count = len(order)
    rank_of, lane_of = np.empty(count, np.int32), np.empty(count, np.int32)
    action = np.empty((count, 6), np.int32)
    start_s, end_s = np.empty(count), np.empty(count)
    span_of = np.full(num_nodes + num_ranks if trace else 1, -1, dtype=np.int32)
    for cell in range(num_ranks * _NUM_LANES):
        for place in range(bounds[cell], bounds[cell + 1]):
            node = order[place]
            rank_of[place], lane_of[place] = cell // _NUM_LANES, cell % _NUM_LANES
            if node < num_nodes:
                row = node if node < num_rows else swept.message_row[node - num_rows]
                for column in range(6):
                    action[place, column] = program.rows[row, column]
                if node >= num_rows:
                    kind = program.rows[row, KIND]
                    action[place, KIND] = _SEND_F if kind in (_F, _SEND_F) else _SEND_B
                    action[place, 5] = 0
                start_s[place], end_s[place] = swept.start_s[node], swept.end_s[node]
            else:
                rank = node - num_nodes
                _tail_action(program, rank, action[place])
                start_s[place], end_s[place] = swept.free_s[rank], swept.free_s[rank] + tail_s[rank]
            if trace:
                span_of[node] = place
    path = np.zeros(0, np.int32)
    if trace and count:
        path = _trace(swept, order, end_s, span_of, num_nodes)
    return rank_of, lane_of, action, start_s, end_s, path


@njit(cache=True)
def _order(program: Program, swept: Swept, tail_s: Floats) -> tuple[Ints, Ints]:
    """Return the nodes with a span by (rank, lane, start) and the bounds of each (rank, lane)."""
    rows, offset, placement = program.rows, program.offset, program.placement
    num_rows, num_ranks = len(rows), len(offset) - 1
    num_nodes = num_rows + swept.num_messages
    bounds = np.zeros(num_ranks * _NUM_LANES + 1, dtype=np.int32)
    for rank in range(num_ranks):
        for index in range(offset[rank], offset[rank + 1]):
            if swept.lane[index] >= 0:
                bounds[rank * _NUM_LANES + swept.lane[index] + 1] += 1
        bounds[rank * _NUM_LANES + COMPUTE_LANE + 1] += tail_s[rank] > 0.0
    for message in range(swept.num_messages):
        node, row = num_rows + message, swept.message_row[message]
        if swept.end_s[node] > swept.start_s[node]:
            bounds[placement[rows[row, REPLICA], rows[row, STAGE]] * _NUM_LANES + SEND_LANE + 1] += 1
    for cell in range(num_ranks * _NUM_LANES):
        bounds[cell + 1] += bounds[cell]
    place = bounds[:-1].copy()
    order = np.empty(bounds[-1], dtype=np.int32)
    for rank in range(num_ranks):
        for index in range(offset[rank], offset[rank + 1]):
            if swept.lane[index] >= 0:
                cell = rank * _NUM_LANES + swept.lane[index]
                order[place[cell]] = index
                place[cell] += 1
        if tail_s[rank] > 0.0:
            order[place[rank * _NUM_LANES + COMPUTE_LANE]] = num_nodes + rank
    for message in range(swept.num_messages):
        node, row = num_rows + message, swept.message_row[message]
        if swept.end_s[node] > swept.start_s[node]:
            cell = placement[rows[row, REPLICA], rows[row, STAGE]] * _NUM_LANES + SEND_LANE
            order[place[cell]] = node
            place[cell] += 1
    for cell in range(num_ranks * _NUM_LANES):
        if cell % _NUM_LANES != COMPUTE_LANE:
            _sort_by_start(order[bounds[cell] : bounds[cell + 1]], swept.start_s)
    return order, bounds


@njit(cache=True)
def _sort_by_start(nodes: Ints, start_s: Floats) -> None:
    for place in range(1, len(nodes)):
        if start_s[nodes[place]] < start_s[nodes[place - 1]]:
            by_start = np.argsort(start_s[nodes], kind="mergesort")
            nodes[:] = nodes[by_start]
            return


@njit(cache=True)
def _tail_action(program: Program, rank: int, action: Ints) -> None:
    """Write an optimizer step of the rank's first stage."""
    action[:] = -1
    action[KIND], action[REPLICA], action[5] = _OPT, 0, 0
    for replica in range(program.placement.shape[0] - 1, -1, -1):
        for stage in range(program.placement.shape[1] - 1, -1, -1):
            if program.placement[replica, stage] == rank:
                action[REPLICA], action[STAGE] = replica, stage


@njit(cache=True)
def _trace(swept: Swept, order: Ints, end_s: Floats, span_of: Ints, num_nodes: int) -> Ints:
    node = order[np.argmax(end_s)]
    path = np.empty(len(order), dtype=np.int32)
    count = 0
    while node >= 0:
        if span_of[node] >= 0:
            path[count] = span_of[node]
            count += 1
        node = swept.last[node - num_nodes] if node >= num_nodes else swept.before[node]
    return path[:count][::-1].copy()
