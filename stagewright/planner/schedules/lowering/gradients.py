"""Gradient reductions and optimizer steps.

REDUCE_GRAD of a stage follows its last B or W; buckets are the runtime's. With several replicas (Chimera, GEMS,
DualPipe) all ranks of a stage reduce together, so each stands at the instant when the last of them is ready, ties by
stage: every rank issues its reductions in one agreed order. OPT of a stage follows at the end of the list for schedules
that flush, and after the last B or W of each update's microbatches where weights change under way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.lowering.insertion import NewRows
from stagewright.planner.schedules.schedule import (
    KIND,
    MICROBATCH,
    REPLICA,
    SLICE,
    STAGE,
    Orders,
    Schedule,
    WeightPolicy,
    encode,
)
from stagewright.planner.simulation.program import Program

Floats = npt.NDArray[np.float64]

UPDATES_PER_MICROBATCH = frozenset({WeightPolicy.STASH, WeightPolicy.NONE, WeightPolicy.PREDICT})


def reduction_rows(schedule: Schedule, program: Program, end_s: Floats) -> NewRows:
    """Return one REDUCE_GRAD row for each stage and rank that holds it, at the instant when all of them are ready."""
    ready = np.full(schedule.placement.shape, -np.inf)
    final = np.isin(program.rows[:, KIND], (Kind.B, Kind.W))
    np.maximum.at(ready, (program.rows[final, REPLICA], program.rows[final, STAGE]), end_s[final])
    if schedule.weight_policy is not WeightPolicy.ELASTIC:
        ready[:] = ready.max(axis=0)  # a replica without microbatches still takes part
    replica, stage = np.nonzero(np.isfinite(ready))
    if schedule.weight_policy is not WeightPolicy.ELASTIC:
        ranks = schedule.placement[replica, stage]
        _, first = np.unique(np.stack((stage, ranks)), axis=1, return_index=True)
        replica, stage = replica[np.sort(first)], stage[np.sort(first)]
    rows = encode(Action(Kind.REDUCE_GRAD, int(s), replica=int(r)) for r, s in zip(replica, stage, strict=True))
    tie = np.iinfo(np.int64).max // 2 + stage.astype(np.int64) * schedule.num_replicas + replica
    return NewRows(schedule.placement[replica, stage], ready[replica, stage], tie, rows)


def with_optimizer_steps(schedule: Schedule) -> tuple[Orders, ...]:
    """Return the orders with OPT rows, where the schedule's weight policy has them."""
    every = update_period(schedule)
    if every:
        return tuple(_after_each_update(order, every) for order in schedule.orders)
    orders = []
    for rank, order in enumerate(schedule.orders):
        held = np.argwhere(rank == schedule.placement.T)
        steps = encode(Action(Kind.OPT, int(stage), replica=int(replica)) for stage, replica in held)
        orders.append(np.concatenate((order, steps)))
    return tuple(orders)


def update_period(schedule: Schedule) -> int:
    """Return after how many microbatches a stage is updated under way; 0 when it is updated at the end of the order."""
    told = schedule.parameters
    if schedule.weight_policy in UPDATES_PER_MICROBATCH:
        return int(told.get("update_every", 1))
    return int(told.get("update_every", 0)) if int(told.get("updates", 1)) > 1 else 0


def _after_each_update(order: Orders, every: int) -> Orders:
    """Return the order with an OPT after the last B or W of each (replica, stage, `every` microbatches)."""
    final = np.flatnonzero(np.isin(order[:, KIND], (Kind.B, Kind.W)))
    keys = order[final][::-1][:, [REPLICA, STAGE, MICROBATCH]]
    keys[:, 2] //= every
    _, from_end = np.unique(keys, axis=0, return_index=True)
    last = np.sort(final[len(final) - 1 - from_end])
    steps = order[last].copy()
    steps[:, KIND], steps[:, SLICE] = Kind.OPT, -1
    return np.insert(order, last + 1, steps, axis=0).astype(np.int32)
