"""Sends and receives, inserted at the same simulated instant into the lists of both ranks.

A message exists for each stage edge that crosses ranks, at the end of the F (or of the B or I on the way back) that
makes it; two stages on one rank need none, so the turns of a wave are free. SEND_F and SEND_B carry the producer's
stage, RECV_F and RECV_B the consumer's. One SEND row serves all other ranks that its stage feeds; one RECV row receives
from all that feed it, and stands at the instant of the first.

Both rows of a message stand behind everything that is over at its instant, ties by the producer, so that every pair of
ranks holds its messages, in both directions together, in one order. A receive is posted before the action that is
running at that instant, hence the replay under rendezvous keeps the simulated times (`simulation.nccl` checks it).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.lowering.insertion import NewRows
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, REPLICA, SLICE, STAGE, Schedule
from stagewright.planner.simulation.program import Program, flatten

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


def message_rows(schedule: Schedule, end_s: Floats) -> NewRows:
    """Return the SEND and RECV rows of a compute-only schedule whose rows end at `end_s`, [num_actions]."""
    program = flatten(schedule)
    forward = np.flatnonzero(program.rows[:, KIND] == Kind.F)
    backward = np.flatnonzero(np.isin(program.rows[:, KIND], (Kind.B, Kind.I)))
    return NewRows.join(
        [
            *_rows_of(program, end_s, forward, program.out_start, program.out_edge, program.edge_to, Kind.SEND_F),
            *_rows_of(program, end_s, backward, program.in_start, program.in_edge, program.edge_from, Kind.SEND_B),
        ]
    )


def _rows_of(
    program: Program,
    end_s: Floats,
    producer: Longs,
    edge_start: npt.NDArray[np.int32],
    edge: npt.NDArray[np.int32],
    edge_end: npt.NDArray[np.int32],
    send: Kind,
) -> tuple[NewRows, NewRows]:
    """Return the sends of the producers, and the receives of the stages at the other end of their edges."""
    stage = program.rows[producer, STAGE]
    degree = edge_start[stage + 1] - edge_start[stage]
    source = np.repeat(producer, degree)
    within = np.arange(len(source)) - np.repeat(np.cumsum(degree) - degree, degree)
    target_stage = edge_end[edge[edge_start[program.rows[source, STAGE]] + within]]
    replica = program.rows[source, REPLICA]
    rank = program.placement[replica, program.rows[source, STAGE]]
    target = program.placement[replica, target_stage]
    crosses = rank != target
    source, target_stage, target = source[crosses], target_stage[crosses], target[crosses]
    senders, first = np.unique(source, return_index=True)
    sends = program.rows[senders].copy()
    sends[:, KIND], sends[:, FUSED] = send, 0
    receives = program.rows[source].copy()
    receives[:, KIND], receives[:, STAGE], receives[:, FUSED] = Kind(send + 1), target_stage, 0
    kept = _first_of_each(receives, end_s[source], source)
    tie = 2 * np.int64(max(int(program.placement.shape[1]), 1))
    return (
        NewRows(rank[crosses][first], end_s[senders], senders.astype(np.int64) * tie, sends),
        NewRows(
            target[kept], end_s[source[kept]], source[kept].astype(np.int64) * tie + target_stage[kept], receives[kept]
        ),
    )


def _first_of_each(receives: npt.NDArray[np.int32], instant_s: Floats, source: Longs) -> Longs:
    """Return the indices of one row for each receive, the earliest where several messages share one."""
    order = np.lexsort((source, instant_s))
    columns = [REPLICA, STAGE, MICROBATCH, SLICE]
    _, first = np.unique(receives[order][:, columns], axis=0, return_index=True)
    return np.sort(order[first])
