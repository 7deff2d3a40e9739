"""The one validator: whether a schedule can run at all, and which action of which rank is wrong when it cannot.

Checked, in this order:

1. every column is in its range, and every action stands on the rank its placement says;
2. each microbatch runs on one replica, and there every stage has, for every slice, exactly one F and either one B or
   one I and one W (a row without a slice stands for all of them);
3. on its rank, F comes before B or I, I before W, R between F and the backward; an evicted or offloaded activation is
   brought back before the backward uses it; slices of a sequence run forwards in order and backwards in reverse;
4. along the edges of the stage graph the lists can be executed together: no cycle of waits;
5. no rank ever holds more activations than the cap.

Every refusal is an InvalidSchedule that names rank and action, with the lists drawn around the place. O(N) compiled for
a good schedule; the search for words only begins when something is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, STAGE, Schedule, decode
from stagewright.planner.simulation.deadlock import explain_deadlock
from stagewright.planner.simulation.kernel import stopped_at
from stagewright.planner.simulation.program import Program, flatten
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.text_grid import draw_order

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

_F, _B, _I, _W, _R = int(Kind.F), int(Kind.B), int(Kind.I), int(Kind.W), int(Kind.R)
_OFFLOAD, _RELOAD, _EVICT, _LOAD = int(Kind.OFFLOAD), int(Kind.RELOAD), int(Kind.EVICT), int(Kind.LOAD)
_FORWARD, _FULL, _INPUT, _WEIGHT = 1, 2, 4, 8  # what a key has had, as bits
_GOOD, _WRONG_RANK, _TWICE, _EARLY, _AWAY, _SLICE_ORDER, _OTHER_REPLICA = range(7)

MEMORY_TOLERANCE = 1e-9


class _Finding(NamedTuple):
    problem: int
    row: int
    other: int


def validate(
    schedule: Schedule,
    *,
    costs: StageCosts | None = None,
    memory_cap: float | None = None,
    assignment: Ints | None = None,
) -> None:
    """Raise InvalidSchedule unless the schedule can run and respects the cap.

    `memory_cap` bounds the live activations of every rank in the unit of `costs.activation`, freed at W (and at I by
    `freed_at_input_grad`); without costs a rank's share of a microbatch counts 1, which its chunks divide.
    `assignment`, int32 [num_microbatches], is the replica of each microbatch; whichever ran its first F unless given.
    """
    program = flatten(schedule)
    sequence = schedule.parameters.get("slice_axis", "sequence") == "sequence"
    found, replica_of, done = _check_rows(program, sequence, _replica_of(program, assignment))
    finding = _Finding(*found.tolist())
    if finding.problem != _GOOD:
        raise _refusal(schedule, program, finding)
    missing = _first_missing(program, replica_of, done)
    if missing[0] >= 0:
        raise _missing(schedule, *missing)
    stopped = stopped_at(program)
    if (stopped < program.offset[1:]).any():
        raise explain_deadlock(schedule, (stopped - program.offset[:-1]).tolist())
    if memory_cap is not None:
        _check_cap(schedule, costs or equal_shares(schedule), memory_cap)


def equal_shares(schedule: Schedule) -> StageCosts:
    """Return unit costs in which the stages of one replica on one rank share an activation of 1."""
    share = np.full(schedule.num_stages, min(1.0, schedule.num_ranks / schedule.num_stages))
    return StageCosts.of(share, share, share, activation=share)


def _replica_of(program: Program, assignment: Ints | None) -> Ints:
    if assignment is None:
        return np.full(program.num_microbatches, -1, dtype=np.int32)
    given = np.ascontiguousarray(assignment, dtype=np.int32).copy()
    if given.shape != (program.num_microbatches,):
        raise InvalidSchedule(
            f"the assignment names {given.size} microbatches, the schedule has {program.num_microbatches}",
            field="assignment",
        )
    return given


@njit(cache=True, no_cpython_wrapper=True)
def _found(problem: int, row: int, other: int) -> npt.NDArray[np.int64]:
    return np.array([problem, row, other], dtype=np.int64)


@njit(cache=True)
def _check_rows(
    program: Program, sequence: bool, replica_of: Ints
) -> tuple[npt.NDArray[np.int64], Ints, npt.NDArray[np.uint8]]:
    """Return the first wrong row (and the row it conflicts with), each microbatch's replica, and what each key has had."""
    rows, offset, placement = program.rows, program.offset, program.placement
    num_slices, num_stages = program.num_slices, placement.shape[1]
    num_keys = placement.size * program.num_microbatches * num_slices
    done = np.zeros(num_keys, dtype=np.uint8)
    away = np.zeros(num_keys, dtype=np.uint8)
    for rank in range(len(offset) - 1):
        for index in range(offset[rank], offset[rank + 1]):
            kind, replica, stage = rows[index, KIND], rows[index, REPLICA], rows[index, STAGE]
            microbatch, part = rows[index, MICROBATCH], rows[index, SLICE]
            if placement[replica, stage] != rank and kind != Kind.FILL:
                return _found(_WRONG_RANK, index, -1), replica_of, done
            moves = kind in (_OFFLOAD, _RELOAD, _EVICT, _LOAD)
            if kind > _R and not moves:
                continue
            if kind == _F and replica_of[microbatch] < 0:
                replica_of[microbatch] = replica
            if replica_of[microbatch] >= 0 and replica_of[microbatch] != replica:
                return _found(_OTHER_REPLICA, index, replica_of[microbatch]), replica_of, done
            key = ((replica * num_stages + stage) * program.num_microbatches + microbatch) * num_slices
            for slot in range(0 if part < 0 else part, num_slices if part < 0 else part + 1):
                had = done[key + slot]
                if moves or kind == _R:
                    leaves = kind in (_OFFLOAD, _EVICT)
                    if (
                        had & _FORWARD == 0
                        or had & (_FULL | _INPUT)
                        or (kind != _R and leaves == (away[key + slot] == 1))
                    ):
                        return _found(_AWAY if moves else _EARLY, index, -1), replica_of, done
                    if moves:
                        away[key + slot] = 1 if leaves else 0
                    continue
                problem = _problem(kind, had)
                if problem == _GOOD and kind in (_B, _I) and away[key + slot]:
                    problem = _AWAY
                if problem == _GOOD and sequence and part >= 0:
                    if kind == _F and slot > 0 and done[key + slot - 1] & _FORWARD == 0:
                        problem = _SLICE_ORDER
                    if kind in (_B, _I) and slot + 1 < num_slices and done[key + slot + 1] & (_FULL | _INPUT) == 0:
                        problem = _SLICE_ORDER
                if problem != _GOOD:
                    return _found(problem, index, -1), replica_of, done
                done[key + slot] = had | (1 << kind)
    return _found(_GOOD, -1, -1), replica_of, done


@njit(cache=True, no_cpython_wrapper=True)
def _problem(kind: int, had: int) -> int:
    """Return what is wrong with a compute action on a key that has had those."""
    if kind == _F:
        return _TWICE if had & _FORWARD else _GOOD
    if had & _FORWARD == 0:
        return _EARLY
    if kind == _W:
        if had & (_FULL | _WEIGHT):
            return _TWICE
        return _GOOD if had & _INPUT else _EARLY
    return _TWICE if had & (_FULL | _INPUT) else _GOOD


@njit(cache=True)
def _first_missing(program: Program, replica_of: Ints, done: npt.NDArray[np.uint8]) -> tuple[int, int, int, int, int]:
    """Return (replica, stage, microbatch, slice, what it has had) of the first incomplete key, or -1s."""
    num_stages, num_slices = program.placement.shape[1], program.num_slices
    for microbatch in range(program.num_microbatches):
        replica = max(replica_of[microbatch], 0)
        for stage in range(num_stages):
            key = ((replica * num_stages + stage) * program.num_microbatches + microbatch) * num_slices
            for slot in range(num_slices):
                had = done[key + slot]
                if had not in (_FORWARD | _FULL, _FORWARD | _INPUT | _WEIGHT):
                    return replica, stage, microbatch, slot, had
    return -1, -1, -1, -1, 0


def _refusal(schedule: Schedule, program: Program, finding: _Finding) -> InvalidSchedule:
    rank = int(np.searchsorted(program.offset, finding.row, side="right")) - 1
    index = finding.row - int(program.offset[rank])
    row = program.rows[finding.row].tolist()
    action = decode(row)
    home = int(schedule.placement[action.replica, action.stage])
    reason, hint = {
        _WRONG_RANK: (
            f"stage {action.stage} is placed on rank {home}",
            f"move it to rank {home}, or change the placement",
        ),
        _TWICE: ("its microbatch has had it already, here or as B", "run each microbatch once: F, then B, or I and W"),
        _EARLY: (_early(action), "put it behind what it needs"),
        _AWAY: (
            "its activation must leave once and be back before its backward",
            "pair EVICT with LOAD, OFFLOAD with RELOAD",
        ),
        _SLICE_ORDER: (
            f"slices run forwards in order and backwards in reverse, and slice {action.slice + (-1 if action.kind is Kind.F else 1)} "
            "has not run",
            "a slice needs the keys and values of those before it, and its backward the gradients of those behind",
        ),
        _OTHER_REPLICA: (
            f"microbatch {action.microbatch} runs on replica {finding.other}, this is replica {action.replica}",
            "a microbatch passes all stages of one replica",
        ),
    }[finding.problem]
    grid = draw_order(schedule, rank, index)
    return InvalidSchedule(f"rank {rank}, step {index}: {action}: {reason}\n{grid}", hint=hint)


def _early(action: Action) -> str:
    needed = action.with_kind(Kind.I if action.kind is Kind.W else Kind.F)
    if action.kind is Kind.R:
        return f"recomputes outside the time between {needed} and the backward"
    return f"stands before {needed} on its rank"


def _missing(schedule: Schedule, replica: int, stage: int, microbatch: int, slot: int, had: int) -> InvalidSchedule:
    kinds = Kind.F if not had & _FORWARD else (Kind.W if had & _INPUT else Kind.B)
    action = Action(kinds, stage, microbatch, slot if schedule.num_slices > 1 else -1, replica)
    rank = int(schedule.placement[replica, stage])
    order = schedule.orders[rank]
    near = np.flatnonzero((order[:, STAGE] == stage) & (order[:, MICROBATCH] <= microbatch))
    grid = draw_order(schedule, rank, int(near[-1]) if len(near) else 0)
    also = " (or its I and W)" if kinds is Kind.B else ""
    return InvalidSchedule(
        f"rank {rank} never runs {action}{also}\n{grid}",
        hint=f"add {action} to rank {rank}: every microbatch passes every stage once",
    )


def _check_cap(schedule: Schedule, costs: StageCosts, memory_cap: float) -> None:
    """Raise InvalidSchedule with the first action over the cap; with peer moves, whose times matter, by simulation."""
    moves = [int(kind) for kind in (Kind.EVICT, Kind.LOAD, Kind.OFFLOAD, Kind.RELOAD)]
    if any(np.isin(order[:, KIND], moves).any() for order in schedule.orders):
        peaks = simulate(schedule, costs, trace=False).peak_memory()
        over = np.flatnonzero(peaks > memory_cap + MEMORY_TOLERANCE)
        if len(over):
            rank = int(over[0])
            raise InvalidSchedule(
                f"rank {rank} holds {peaks[rank]:g} live activations, the cap is {memory_cap:g}",
                field="memory_cap",
                hint=f"give a cap of at least {float(peaks.max()):g}",
            )
        return
    for rank, order in enumerate(schedule.orders):
        live = _live(np.ascontiguousarray(order), costs.activation, costs.freed_at_input_grad, schedule.num_slices)
        over = np.flatnonzero(live > memory_cap + MEMORY_TOLERANCE)
        if len(over):
            index = int(over[0])
            raise InvalidSchedule(
                f"rank {rank}, step {index}: {decode(order[index].tolist())} is live activation number {live[index]:g}, "
                f"the cap is {memory_cap:g}\n{draw_order(schedule, rank, index)}",
                field="memory_cap",
                hint=f"rank {rank} needs {float(live.max()):g}; give a cap of at least that, or another schedule",
            )


@njit(cache=True)
def _live(order: Ints, activation: Floats, freed_at_input_grad: Floats, num_slices: int) -> Floats:
    """Return the live activations after each row."""
    live, now = np.zeros(len(order)), 0.0
    for index in range(len(order)):
        kind, stage = order[index, KIND], order[index, STAGE]
        size = activation[stage] * (1.0 if order[index, SLICE] < 0 else 1.0 / num_slices)
        if kind == _F:
            now += size
        elif kind == _B:
            now -= size
        elif kind == _I:
            now -= size * freed_at_input_grad[stage]
        elif kind == _W:
            now -= size * (1.0 - freed_at_input_grad[stage])
        live[index] = now
    return live
