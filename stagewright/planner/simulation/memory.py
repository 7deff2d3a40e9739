"""The memory ledger: what is live on each rank at every moment, from the times of its actions.

Compute of a rank changes its memory in list order (an activation comes at the start of F; a share of it goes at the end
of I, or comes at its start where the share is negative, the rest goes at the end of W, all of it at the end of B), so those events are sorted as they are. What runs beside
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
    program: Program, shift: Ints, start_s: Floats, end_s: Floats, ledger: Ledger, side: SideEvents
) -> tuple[tuple[Floats, ...], tuple[Floats, ...]]:
    """Return (times, values) of each rank: from time k on, value k is live; times increase strictly.

    Row i of rank r has its times at `i + shift[r]` of `start_s` and `end_s`.
    """
    allocated, freed = _changes(ledger)
    scaled = bool((ledger.size_share[1:] != 1.0).any() or (ledger.size_factor != 1.0).any())
    times, values, stops = _compute_curves(program, shift, start_s, end_s, ledger, allocated, freed, scaled)
    if len(side.rank):
        times, values, stops = _merged(times, values, stops, side)
    starts = np.concatenate(([0], stops[:-1]))
    cut = [slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]
    return tuple(times[part] for part in cut), tuple(values[part] for part in cut)


def _changes(ledger: Ledger) -> tuple[Floats, Floats]:
    """Return what a whole microbatch allocates at the start of an action and frees at its end, [kinds up to R, num_stages]."""
    allocated, freed = np.zeros((_R + 1, len(ledger.activation))), np.zeros((_R + 1, len(ledger.activation)))
    at_input_grad = ledger.activation * ledger.freed_at_input_grad
    again = np.where(ledger.has_recompute, 0.0, ledger.recomputed)
    allocated[_F], allocated[_B], allocated[_R] = ledger.activation, again, ledger.recomputed
    allocated[_I] = again + np.maximum(-at_input_grad, 0.0)
    freed[_B], freed[_I] = ledger.activation + ledger.recomputed, np.maximum(at_input_grad, 0.0)
    freed[_W] = ledger.activation - at_input_grad + ledger.recomputed
    return allocated, freed


@njit(cache=True)
def _compute_curves(
    program: Program,
    shift: Ints,
    start_s: Floats,
    end_s: Floats,
    ledger: Ledger,
    allocated: Floats,
    freed: Floats,
    scaled: bool,
) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Return times and values of all ranks in one array each, and where each rank's part ends, without side events.

    A value at the time of the one before takes its place, so frees hide under the allocations of the same moment.
    """
    rows, offset = program.rows, program.offset
    num_ranks = len(offset) - 1
    times, values = np.empty(2 * len(rows) + num_ranks), np.empty(2 * len(rows) + num_ranks)
    stops = np.zeros(num_ranks, dtype=np.int64)
    place = -1
    for rank in range(num_ranks):
        place += 1
        latest, live = 0.0, ledger.static[rank]
        times[place], values[place] = latest, live
        first = offset[rank]  # of the fused group, whose rows change memory together
        goes = 0.0
        for index in range(offset[rank], offset[rank + 1]):
            kind, stage = rows[index, KIND], rows[index, STAGE]
            if kind <= _R:
                share = 1.0
                if scaled:
                    share = ledger.size_share[rows[index, SLICE] + 1] * ledger.size_factor[rows[index, MICROBATCH]]
                comes = allocated[kind, stage]
                if comes != 0.0:
                    live += comes * share
                    time = start_s[first + shift[rank]]
                    place += time > latest
                    latest = time
                    times[place], values[place] = time, live
                goes += freed[kind, stage] * share
            if rows[index, FUSED] == 0:
                if goes != 0.0:
                    live -= goes
                    time = end_s[first + shift[rank]]
                    place += time > latest
                    latest = time
                    times[place], values[place] = time, live
                first, goes = index + 1, 0.0
        stops[rank] = place + 1
    return times, values, stops


@njit(cache=True)
def _merged(
    times: Floats, values: Floats, stops: npt.NDArray[np.int64], side: SideEvents
) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Return the curves with the side events added."""
    capacity = stops[-1] + len(side.rank)
    merged_times, merged_values, merged_stops = np.empty(capacity), np.empty(capacity), np.zeros_like(stops)
    place, event, at = -1, 0, 0
    for rank in range(len(stops)):
        first, beside = place + 1, 0.0
        while at < stops[rank] or (event < len(side.rank) and side.rank[event] == rank):
            has_event = event < len(side.rank) and side.rank[event] == rank
            if at < stops[rank] and (not has_event or times[at] <= side.time_s[event]):
                time, level = times[at], values[at]
                at += 1
            else:
                time, level = side.time_s[event], values[at - 1]
                beside += side.change[event]
                event += 1
            if place < first or time > merged_times[place]:
                place += 1
            merged_times[place], merged_values[place] = time, level + beside
        merged_stops[rank] = place + 1
    return merged_times, merged_values, merged_stops


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
    program: Program,
    shift: Ints,
    end_s: Floats,
    arrival_s: Floats,
    forward_bytes: Floats,
    gradient_bytes: Floats,
    ledger: Ledger,
) -> SideEvents:
    """Return the changes of receive buffers: from a message's arrival to the end of the action that uses it, unsorted.

    `arrival_s` is [2, num_edge_keys], forwards in row 0; row i of rank r ends at `end_s[i + shift[r]]`.
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
                    rank_of[place + 1], time_s[place + 1], change[place + 1] = rank, end_s[index + shift[rank]], -size
                    place += 2
    return SideEvents(rank_of[:place], time_s[:place], change[:place])
