"""Sends and receives, inserted at the same simulated instant into the lists of both ranks.

A message exists for each stage edge that crosses ranks, at the end of the F (or of the B or I on the way back) that
makes it; two stages on one rank need none, so the turns of a wave are free. SEND_F and SEND_B carry the producer's
stage, RECV_F and RECV_B the consumer's. One SEND row serves all other ranks that its stage feeds; one RECV row receives
from all that feed it. Messages that share a row, or a row with one that shares a row with them, are a *group*, and all rows of a
group stand at one instant: when the last of its producers ends. In a chain a group is one message.

All rows of a group stand behind everything that is over at its instant, ties by the first producer, so that every pair of
ranks holds its messages, in both directions together, in one order. A receive is posted before the action that is
running at that instant, hence the replay under rendezvous keeps the simulated times (`simulation.nccl` checks it).

A group of several senders and several receivers holds back the messages of senders that are ready before the last. Then the
instants have to come from a simulation in which every receiver waits for all senders of its group: `joint_edges` says for whom.

Where a receiver of a group leads to one of its senders, as the stage under a skip connection does, no such instant exists. There each
SEND stands where its producer ends and a RECV of several at the instant of the first, in no order that NCCL could be held to.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.lowering.insertion import NewRows
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, REPLICA, SLICE, STAGE, Schedule
from stagewright.planner.simulation.program import Program, flatten

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


def joint_edges(schedule: Schedule) -> tuple[tuple[int, int], ...]:
    """Return the stage graph's edges, and behind them those from every sender of a group to every receiver that it does not feed."""
    groups = _stage_groups(schedule)
    known = set(schedule.edges)
    added = [
        (sender, receiver)
        for senders, receivers in groups
        if not _leads(schedule.edges, receivers, senders)
        for sender in sorted(senders)
        for receiver in sorted(receivers)
        if (sender, receiver) not in known
    ]
    return (*schedule.edges, *added)


def shares_rows(schedule: Schedule) -> bool:
    """Tell whether a group has several senders and several receivers."""
    return any(len(senders) > 1 and len(receivers) > 1 for senders, receivers in _stage_groups(schedule))


def stages_without_instant(schedule: Schedule) -> frozenset[int]:
    """Return the stages that send or receive in groups which no instant can hold together."""
    return frozenset(
        stage
        for senders, receivers in _stage_groups(schedule)
        if _leads(schedule.edges, receivers, senders)
        for stage in senders | receivers
    )


def _stage_groups(schedule: Schedule) -> list[tuple[set[int], set[int]]]:
    """Return the senders and receivers of each group of the stage graph's edges that cross ranks."""
    crossing = [
        edge for edge in schedule.edges if (schedule.placement[:, edge[0]] != schedule.placement[:, edge[1]]).any()
    ]
    if not crossing:
        return []
    source, target = np.array(crossing).T
    found: dict[int, tuple[set[int], set[int]]] = {}
    for group, sender, receiver in zip(_groups(source, target).tolist(), *zip(*crossing, strict=True), strict=True):
        senders, receivers = found.setdefault(group, (set(), set()))
        senders.add(sender)
        receivers.add(receiver)
    return list(found.values())


def _leads(edges: tuple[tuple[int, int], ...], sources: set[int], targets: set[int]) -> bool:
    """Tell whether a path, of no edge too, leads from a source to a target; a group of one edge needs no look."""
    if len(sources) == len(targets) == 1:
        return False
    after: dict[int, list[int]] = {}
    for source, target in edges:
        after.setdefault(source, []).append(target)
    seen, left = set(sources), list(sources)
    while left:
        for stage in after.get(left.pop(), ()):
            if stage not in seen:
                seen.add(stage)
                left.append(stage)
    return bool(seen & targets)


def message_rows(schedule: Schedule, end_s: Floats, without_instant: Collection[int]) -> NewRows:
    """Return the SEND and RECV rows of a compute-only schedule whose rows end at `end_s`, [num_actions].

    `without_instant` are the stages of `stages_without_instant`.
    """
    program = flatten(schedule)
    apart = np.isin(np.arange(schedule.num_stages), list(without_instant))
    forward = np.flatnonzero(program.rows[:, KIND] == Kind.F)
    backward = np.flatnonzero(np.isin(program.rows[:, KIND], (Kind.B, Kind.I)))
    return NewRows.join(
        [
            *_rows_of(
                program, end_s, apart, forward, program.out_start, program.out_edge, program.edge_to, Kind.SEND_F
            ),
            *_rows_of(
                program, end_s, apart, backward, program.in_start, program.in_edge, program.edge_from, Kind.SEND_B
            ),
        ]
    )


def _rows_of(
    program: Program,
    end_s: Floats,
    apart: npt.NDArray[np.bool_],
    producer: Longs,
    edge_start: npt.NDArray[np.int32],
    edge: npt.NDArray[np.int32],
    edge_end: npt.NDArray[np.int32],
    send: Kind,
) -> tuple[NewRows, NewRows]:
    """Return the sends of the producers, and the receives of the stages at the other end of their edges.

    `apart` [S] marks the stages whose producers send each at its own instant.
    """
    stage = program.rows[producer, STAGE]
    degree = edge_start[stage + 1] - edge_start[stage]
    source = np.repeat(producer, degree)
    within = np.arange(len(source)) - np.repeat(np.cumsum(degree) - degree, degree)
    target_stage = edge_end[edge[edge_start[program.rows[source, STAGE]] + within]]
    replica = program.rows[source, REPLICA]
    rank = program.placement[replica, program.rows[source, STAGE]]
    target = program.placement[replica, target_stage]
    crosses = rank != target
    source, target_stage, rank, target = source[crosses], target_stage[crosses], rank[crosses], target[crosses]
    receives = program.rows[source].copy()
    receives[:, KIND], receives[:, STAGE], receives[:, FUSED] = Kind(send + 1), target_stage, 0
    _, first_receive, receive = np.unique(
        receives[:, [REPLICA, STAGE, MICROBATCH, SLICE]], axis=0, return_index=True, return_inverse=True
    )
    senders, first_send = np.unique(source, return_index=True)
    sends = program.rows[senders].copy()
    sends[:, KIND], sends[:, FUSED] = send, 0
    receive = receive.ravel()
    group = np.where(apart[program.rows[source, STAGE]], source, _groups(source, receive))
    instant_s = np.full(len(end_s), -np.inf)
    np.maximum.at(instant_s, group, end_s[source])
    # Of a group: by the stage that sends, its SEND in front of the RECVs, these by the stage that receives.
    num_stages = int(program.placement.shape[1])
    place = (group * num_stages + program.rows[source, STAGE]) * (num_stages + 1)
    by_instant = np.lexsort((place, instant_s[group]))
    _, first = np.unique(receive[by_instant], return_index=True)
    first = by_instant[first]
    # RECVs of a group on one rank stand together, by stage: a SEND to several of them counts them in that order.
    together = np.stack((group[first], target[first_receive]), axis=1)
    _, shared = np.unique(together, axis=0, return_inverse=True)
    earliest = np.full(len(first), np.iinfo(np.int64).max)
    np.minimum.at(earliest, shared.ravel(), place[first])
    return (
        NewRows(rank[first_send], instant_s[group[first_send]], place[first_send], sends),
        NewRows(
            target[first_receive],
            instant_s[group[first]],
            earliest[shared.ravel()] + 1 + target_stage[first_receive],
            receives[first_receive],
        ),
    )


def _groups(source: Longs, target: Longs) -> Longs:
    """Return, for each pair of a source and a target, the least source that it is connected with."""
    group = np.asarray(source, dtype=np.int64)
    least_of_target = np.full(int(np.max(target, initial=-1)) + 1, np.iinfo(np.int64).max)
    least_of_source = np.full(int(np.max(source, initial=-1)) + 1, np.iinfo(np.int64).max)
    while True:
        np.minimum.at(least_of_target, target, group)
        np.minimum.at(least_of_source, source, least_of_target[target])
        found = least_of_source[source]
        if np.array_equal(found, group):
            return group
        group = found
