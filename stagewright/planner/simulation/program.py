"""A schedule as the flat arrays that compiled code walks over.

Every interpreter of a schedule (validator, both simulators, the NCCL checker, the lowering passes) needs the same
things: all rows behind each other, where each rank begins, who precedes a stage in the stage graph, and a dense key

    key(replica, stage, microbatch, slice) = ((replica * S + stage) * T + microbatch) * K + slice

A row whose slice is -1 stands for the whole microbatch: it writes, and waits for, all K slots of its key.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, REPLICA, SLICE, STAGE, Schedule

Ints = npt.NDArray[np.int32]

_F, _B, _I = int(Kind.F), int(Kind.B), int(Kind.I)
_SEND_F, _SEND_B = int(Kind.SEND_F), int(Kind.SEND_B)
_UNSHARD, _OPT, _FILL = int(Kind.UNSHARD), int(Kind.OPT), int(Kind.FILL)


class Program(NamedTuple):
    """Flat arrays of a schedule; N rows, D ranks, R replicas, S stages, E edges, T microbatches, K slices.

    `rows` is int32 [N, 6] and the rows of rank r are `offset[r]` to `offset[r + 1]`. `in_edge[in_start[s]:in_start[s +
    1]]` are the edges into stage s, `out_edge` those out of it; edge e goes from `edge_from[e]` to `edge_to[e]`.
    """

    rows: Ints
    offset: Ints
    placement: Ints
    edge_from: Ints
    edge_to: Ints
    in_start: Ints
    in_edge: Ints
    out_start: Ints
    out_edge: Ints
    num_microbatches: int
    num_slices: int
    kind_counts: npt.NDArray[np.int64]
    has_fused: bool


def flatten(schedule: Schedule) -> Program:
    """Return the schedule's flat arrays; raises InvalidSchedule for a column out of its range."""
    rows = schedule.orders[0] if schedule.num_ranks == 1 else np.concatenate(schedule.orders)
    rows = np.ascontiguousarray(rows, dtype=np.int32).reshape(-1, 6)
    offset = np.zeros(schedule.num_ranks + 1, dtype=np.int32)
    np.cumsum([len(order) for order in schedule.orders], out=offset[1:])
    edges = np.array(schedule.edges, dtype=np.int32).reshape(-1, 2)
    in_start, in_edge = _edges_by_stage(edges[:, 1], schedule.num_stages)
    out_start, out_edge = _edges_by_stage(edges[:, 0], schedule.num_stages)
    lowest, highest, kind_counts = _scan(rows, len(Kind))
    program = Program(
        rows,
        offset,
        np.ascontiguousarray(schedule.placement, dtype=np.int32),
        np.ascontiguousarray(edges[:, 0]),
        np.ascontiguousarray(edges[:, 1]),
        in_start,
        in_edge,
        out_start,
        out_edge,
        schedule.num_microbatches,
        schedule.num_slices,
        kind_counts,
        bool(highest[FUSED] > 0),
    )
    _check_ranges(schedule, program, lowest, highest)
    return program


def _edges_by_stage(stage_of_edge: Ints, num_stages: int) -> tuple[Ints, Ints]:
    start = np.zeros(num_stages + 1, dtype=np.int32)
    np.cumsum(np.bincount(stage_of_edge, minlength=num_stages), out=start[1:])
    return start, np.argsort(stage_of_edge, kind="stable").astype(np.int32)


@njit(cache=True)
def _scan(rows: Ints, num_kinds: int) -> tuple[Ints, Ints, npt.NDArray[np.int64]]:
    """Return least and greatest value of each column and the number of rows of each kind.

    Microbatches only of the kinds that have one: not of collectives, optimizer steps and fillers.
    """
    lowest, highest = np.zeros(6, dtype=np.int32), np.full(6, -1, dtype=np.int32)
    kind_counts = np.zeros(num_kinds, dtype=np.int64)
    for index in range(len(rows)):
        for column in range(6):
            if column != MICROBATCH or _names_microbatch(rows[index, KIND]):
                lowest[column] = min(lowest[column], rows[index, column])
                highest[column] = max(highest[column], rows[index, column])
        if 0 <= rows[index, KIND] < num_kinds:
            kind_counts[rows[index, KIND]] += 1
    return lowest, highest, kind_counts


@njit(cache=True, no_cpython_wrapper=True)
def _names_microbatch(kind: int) -> bool:
    return kind < _UNSHARD or _OPT < kind < _FILL


def _check_ranges(schedule: Schedule, program: Program, lowest: Ints, highest: Ints) -> None:
    limits = (
        (KIND, 0, len(Kind), "kind"),
        (REPLICA, 0, schedule.num_replicas, "replica"),
        (STAGE, 0, schedule.num_stages, "stage"),
        (MICROBATCH, 0, schedule.num_microbatches, "microbatch"),
        (SLICE, -1, schedule.num_slices, "slice"),
    )
    for column, least, limit, noun in limits:
        if lowest[column] < least or highest[column] >= limit:
            values = program.rows[:, column]
            wrong = (values < least) | (values >= limit)
            if column == MICROBATCH:
                kind = program.rows[:, KIND]
                wrong &= (kind < _UNSHARD) | ((kind > _OPT) & (kind < _FILL))
            index = int(np.argmax(wrong))
            rank = int(np.searchsorted(program.offset, index, side="right")) - 1
            raise InvalidSchedule(
                f"rank {rank}, step {index - int(program.offset[rank])}: {noun} {values[index]} is outside the "
                f"schedule's {limit}",
                field=noun,
                hint=f"a {noun} is at least {least} and at most {limit - 1}",
            )
    for rank, order in enumerate(schedule.orders):
        if len(order) and order[-1, FUSED] > 0:
            raise InvalidSchedule(f"rank {rank}: its last step is fused with a step behind it, and there is none")
    if schedule.placement.min() < 0 or schedule.placement.max() >= schedule.num_ranks:
        raise InvalidSchedule(
            f"the placement names rank {int(schedule.placement.max())}, the schedule has {schedule.num_ranks} ranks",
            field="placement",
        )


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
