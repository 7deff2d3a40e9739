"""The memory ledger: what is live on each rank at every moment, from the times of its actions.

Compute of a rank changes its memory in list order (an activation comes at the start of F; a share of it goes at the end
of I, the rest at the end of W, all of it at the end of B), so those events are sorted as they are. What runs beside
compute (EVICT, LOAD, OFFLOAD, RELOAD, gathered parameters, received messages) is sorted and merged in. At equal times
frees come before allocations: an action may use what the one before it gave back. O(N + L log L) for L side events.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, REPLICA, SLICE, STAGE
from stagewright.planner.simulation.program import Program

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

_F, _B, _I, _W, _R = int(Kind.F), int(Kind.B), int(Kind.I), int(Kind.W), int(Kind.R)
_UNSHARD, _RESHARD = int(Kind.UNSHARD), int(Kind.RESHARD)
_OFFLOAD, _RELOAD, _EVICT, _LOAD = int(Kind.OFFLOAD), int(Kind.RELOAD), int(Kind.EVICT), int(Kind.LOAD)


class Ledger(NamedTuple):
    """Sizes the ledger adds and takes away.

    `activation`, `freed_at_input_grad`, `recomputed` and `gathered` are [num_stages]; `has_recompute` [num_stages] says
    where R actions stand, so that the backward does not allocate again; `size_share` is [num_slices + 1], whole
    microbatches at 0; `size_factor` is [num_microbatches]; `static` and `peer` are [num_ranks].
    """

    activation: Floats
    freed_at_input_grad: Floats
    recomputed: Floats
    gathered: Floats
    has_recompute: npt.NDArray[np.bool_]
    size_share: Floats
    size_factor: Floats
    static: Floats
    peer: Ints


class SideEvents(NamedTuple):
    """Changes outside the order of compute, sorted by (rank, time, change)."""

    rank: Ints
    time_s: Floats
    change: Floats


def sort_events(events: SideEvents) -> SideEvents:
    """Return the events sorted by (rank, time, change), frees before allocations."""
    order = np.lexsort((events.change, events.time_s, events.rank))
    return SideEvents(events.rank[order], events.time_s[order], events.change[order])


def memory_curves(
    program: Program, start_s: Floats, end_s: Floats, ledger: Ledger, side: SideEvents
) -> tuple[tuple[Floats, ...], tuple[Floats, ...]]:
    """Return (times, values) of each rank: from time k on, value k is live; times increase strictly."""
    times, values, stops = _curves(program, start_s, end_s, ledger, side)
    starts = np.concatenate(([0], stops[:-1, 1]))
    cut = [slice(int(start), int(stop)) for start, stop in zip(starts, stops[:, 0], strict=True)]
    return tuple(times[part] for part in cut), tuple(values[part] for part in cut)


@njit(cache=True)
def _curves(
    program: Program, start_s: Floats, end_s: Floats, ledger: Ledger, side: SideEvents
) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Return times and values of all ranks in one array each, and (end, capacity end) of each rank's part."""
    rows, offset = program.rows, program.offset
    num_ranks = len(offset) - 1
    capacity = 2 * len(rows) + len(side.rank) + num_ranks
    times, values = np.empty(capacity), np.empty(capacity)
    stops = np.zeros((num_ranks, 2), dtype=np.int64)
    base, event = 0, 0
    for rank in range(num_ranks):
        place, live = base, ledger.static[rank]
        times[place], values[place] = 0.0, live
        index, stop = offset[rank], offset[rank + 1]
        while index < stop:
            after = index + 1
            while rows[after - 1, FUSED] == 1 and after < stop:
                after += 1
            allocated, freed = 0.0, 0.0
            for row in range(index, after):
                kind, stage = rows[row, KIND], rows[row, STAGE]
                if kind > _R:
                    continue
                share = ledger.size_share[rows[row, SLICE] + 1] * ledger.size_factor[rows[row, MICROBATCH]]
                size, again = ledger.activation[stage] * share, ledger.recomputed[stage] * share
                if kind == _F:
                    allocated += size
                elif kind == _B:
                    freed += size + again
                elif kind == _I:
                    freed += size * ledger.freed_at_input_grad[stage]
                elif kind == _W:
                    freed += size * (1.0 - ledger.freed_at_input_grad[stage]) + again
                if kind == _R or (kind in (_B, _I) and not ledger.has_recompute[stage]):
                    allocated += again
            for part in range(2):
                change = allocated if part == 0 else -freed
                if change == 0.0:
                    continue
                time = start_s[index] if part == 0 else end_s[index]
                while event < len(side.rank) and side.rank[event] == rank and _comes_first(side, event, time, change):
                    live += side.change[event]
                    place = _record(times, values, place, side.time_s[event], live)
                    event += 1
                live += change
                place = _record(times, values, place, time, live)
            index = after
        while event < len(side.rank) and side.rank[event] == rank:
            live += side.change[event]
            place = _record(times, values, place, side.time_s[event], live)
            event += 1
        stops[rank, 0] = place + 1
        base = place + 1
        stops[rank, 1] = base
    return times, values, stops


@njit(cache=True)
def _comes_first(side: SideEvents, event: int, time: float, change: float) -> bool:
    return bool(side.time_s[event] < time or (side.time_s[event] == time and side.change[event] < change))


@njit(cache=True)
def _record(times: Floats, values: Floats, place: int, time: float, live: float) -> int:
    """Write the value at `time` and return its place; events at one time share it, so frees hide under allocations."""
    if time > times[place]:
        place += 1
        times[place] = time
    values[place] = live
    return place


@njit(cache=True)
def move_events(program: Program, start_s: Floats, end_s: Floats, ledger: Ledger) -> SideEvents:
    """Return the changes of EVICT, LOAD, OFFLOAD, RELOAD, UNSHARD and RESHARD, on the rank and on its peer, unsorted."""
    rows, offset = program.rows, program.offset
    count = 0
    for index in range(len(rows)):
        count += rows[index, KIND] >= _UNSHARD
    rank_of, time_s, change = np.empty(2 * count, np.int32), np.empty(2 * count), np.empty(2 * count)
    place = 0
    for rank in range(len(offset) - 1):
        for index in range(offset[rank], offset[rank + 1]):
            kind, stage = rows[index, KIND], rows[index, STAGE]
            if kind < _UNSHARD:
                continue
            if kind in (_UNSHARD, _RESHARD):
                rank_of[place], time_s[place] = rank, start_s[index]
                change[place] = ledger.gathered[stage] if kind == _UNSHARD else -ledger.gathered[stage]
                place += 1
            if kind not in (_OFFLOAD, _RELOAD, _EVICT, _LOAD):
                continue
            size = ledger.activation[stage] * ledger.size_share[rows[index, SLICE] + 1]
            size *= ledger.size_factor[rows[index, MICROBATCH]]
            away = kind in (_OFFLOAD, _EVICT)
            rank_of[place], change[place] = rank, -size if away else size
            time_s[place] = end_s[index] if away else start_s[index]
            place += 1
            if kind in (_EVICT, _LOAD):
                rank_of[place], change[place] = ledger.peer[rank], size if away else -size
                time_s[place] = start_s[index] if away else end_s[index]
                place += 1
    return SideEvents(rank_of[:place], time_s[:place], change[:place])


@njit(cache=True)
def receive_events(
    program: Program, end_s: Floats, arrival_s: Floats, forward_bytes: Floats, gradient_bytes: Floats, ledger: Ledger
) -> SideEvents:
    """Return the changes of receive buffers: from a message's arrival to the end of the action that uses it, unsorted.

    `arrival_s` is [2, num_edge_keys], forwards in row 0.
    """
    rows, offset, slices = program.rows, program.offset, program.num_slices
    degree = 1
    for stage in range(program.placement.shape[1]):
        degree = max(degree, program.in_start[stage + 1] - program.in_start[stage])
        degree = max(degree, program.out_start[stage + 1] - program.out_start[stage])
    capacity = 2 * len(rows) * degree * slices
    rank_of, time_s, change = np.empty(capacity, np.int32), np.empty(capacity), np.empty(capacity)
    place = 0
    for rank in range(len(offset) - 1):
        for index in range(offset[rank], offset[rank + 1]):
            kind, replica, stage = rows[index, KIND], rows[index, REPLICA], rows[index, STAGE]
            if kind not in (_F, _B, _I):
                continue
            microbatch, part = rows[index, MICROBATCH], rows[index, SLICE]
            way = 0 if kind == _F else 1
            start, stop = program.in_start[stage], program.in_start[stage + 1]
            if way == 1:
                start, stop = program.out_start[stage], program.out_start[stage + 1]
            for step in range(start, stop):
                edge = program.in_edge[step] if way == 0 else program.out_edge[step]
                other = program.edge_from[edge] if way == 0 else program.edge_to[edge]
                if program.placement[replica, other] == rank:
                    continue
                key = ((replica * len(program.edge_from) + edge) * program.num_microbatches + microbatch) * slices
                for slot in range(0 if part < 0 else part, slices if part < 0 else part + 1):
                    size = forward_bytes[edge] if way == 0 else gradient_bytes[edge]
                    size *= ledger.size_factor[microbatch] * ledger.size_share[slot + 1 if slices > 1 else 0]
                    rank_of[place], time_s[place], change[place] = rank, arrival_s[way, key + slot], size
                    rank_of[place + 1], time_s[place + 1], change[place + 1] = rank, end_s[index], -size
                    place += 2
    return SideEvents(rank_of[:place], time_s[:place], change[:place])
