"""The checker refuses what NCCL would hang on, though gloo, with tags and buffers, would run it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.lowering import lower
from stagewright.planner.schedules.schedule import KIND, Schedule, encode
from stagewright.planner.simulation.nccl import check_nccl
from stagewright.planner.simulation.network import Links
from tests.planner.simulation.random_schedules import one_f_one_b, schedules

PAIR = np.array([[0, 1]], dtype=np.int32)


def two_ranks(first, second, microbatches=2):
    return Schedule("custom", microbatches, PAIR, (encode(first), encode(second)))


def test_sends_and_receives_in_different_orders_are_refused():
    first = [Action(Kind.F, 0, 0), Action(Kind.SEND_F, 0, 0), Action(Kind.F, 0, 1), Action(Kind.SEND_F, 0, 1)]
    good = [Action(Kind.RECV_F, 1, 0), Action(Kind.RECV_F, 1, 1), Action(Kind.F, 1, 0), Action(Kind.F, 1, 1)]
    bad = [Action(Kind.RECV_F, 1, 1), Action(Kind.RECV_F, 1, 0), Action(Kind.F, 1, 1), Action(Kind.F, 1, 0)]
    check_nccl(two_ranks(first, good))
    with pytest.raises(InvalidSchedule, match=r"rank 0 and rank 1 meet in different orders|rank 1 and rank 0 meet"):
        check_nccl(two_ranks(first, bad))


def test_both_ranks_sending_first_hangs_on_one_stream_but_not_on_one_for_each_direction():
    placement = np.array([[0, 1], [1, 0]], dtype=np.int32)

    def side(rank):
        return encode(
            [
                Action(Kind.F, 0, rank, replica=rank),
                Action(Kind.SEND_F, 0, rank, replica=rank),
                Action(Kind.RECV_F, 1, 1 - rank, replica=1 - rank),
                Action(Kind.F, 1, 1 - rank, replica=1 - rank),
            ]
        )

    schedule = Schedule("custom", 2, placement, (side(0), side(1)))
    check_nccl(schedule, per_direction=True)
    with pytest.raises(InvalidSchedule, match="meet in different orders"):
        check_nccl(schedule, per_direction=False)
    with pytest.raises(InvalidSchedule, match="no rank can go on"):
        check_nccl(schedule, per_direction=True, blocking=True)


def test_a_receive_posted_behind_the_compute_that_its_sender_waits_for_hangs():
    # Rank 1 posts the receive of microbatch 1 behind 1B0; rank 0 does 0B0 (which needs 1B0's gradient) only after
    # sending microbatch 1, whose message stands in front of the gradient's: gloo buffers it, one NCCL stream does not.
    first = [
        Action(Kind.F, 0, 0),
        Action(Kind.SEND_F, 0, 0),
        Action(Kind.F, 0, 1),
        Action(Kind.SEND_F, 0, 1),
        Action(Kind.RECV_B, 0, 0),
        Action(Kind.B, 0, 0),
        Action(Kind.RECV_B, 0, 1),
        Action(Kind.B, 0, 1),
    ]
    second = [
        Action(Kind.RECV_F, 1, 0),
        Action(Kind.F, 1, 0),
        Action(Kind.B, 1, 0),
        Action(Kind.SEND_B, 1, 0),
        Action(Kind.RECV_F, 1, 1),
        Action(Kind.F, 1, 1),
        Action(Kind.B, 1, 1),
        Action(Kind.SEND_B, 1, 1),
    ]
    check_nccl(two_ranks(first, second), per_direction=True)
    with pytest.raises(InvalidSchedule, match="meet in different orders"):
        check_nccl(two_ranks(first, second), per_direction=False)


def test_compute_before_its_receive_is_refused():
    first = [Action(Kind.F, 0, 0), Action(Kind.SEND_F, 0, 0)]
    second = [Action(Kind.F, 1, 0), Action(Kind.RECV_F, 1, 0)]
    with pytest.raises(InvalidSchedule, match="rank 1: 1F0 stands before 1RECV_F0"):
        check_nccl(two_ranks(first, second, 1))


def test_a_send_without_its_receive_is_refused():
    first = [Action(Kind.F, 0, 0), Action(Kind.SEND_F, 0, 0), Action(Kind.F, 0, 1), Action(Kind.SEND_F, 0, 1)]
    second = [Action(Kind.RECV_F, 1, 0), Action(Kind.F, 1, 0)]
    with pytest.raises(InvalidSchedule, match="0SEND_F1 is never met by rank 1"):
        check_nccl(two_ranks(first, second))


def test_reductions_of_replicas_in_different_orders_are_refused():
    placement = np.array([[0, 1], [1, 0]], dtype=np.int32)

    def reductions(*pairs):
        return encode([Action(Kind.REDUCE_GRAD, stage, replica=replica) for replica, stage in pairs])

    check_nccl(Schedule("custom", 1, placement, (reductions((0, 0), (1, 1)), reductions((1, 0), (0, 1)))))
    with pytest.raises(InvalidSchedule, match="reduce in another order"):
        check_nccl(Schedule("custom", 1, placement, (reductions((0, 0), (1, 1)), reductions((0, 1), (1, 0)))))


@given(schedules(dag=False))
@settings(max_examples=100)
def test_every_lowered_random_schedule_passes_in_every_mode(case):
    schedule, costs, rng = case
    lowered = lower(schedule, costs, links=Links(latency_s=rng.choice([0.0, 0.25])), data_parallel=True)
    check_nccl(lowered, per_direction=True)
    check_nccl(lowered, per_direction=False)


def test_a_lowered_schedule_with_two_receives_swapped_is_refused():
    lowered = lower(one_f_one_b(4, 8), StageCosts.uniform(4))
    order = lowered.orders[1].copy()
    receives = np.flatnonzero(order[:, KIND] == Kind.RECV_F)[:2]
    order[receives] = order[receives[::-1]]
    with pytest.raises(InvalidSchedule):
        check_nccl(replace(lowered, orders=(lowered.orders[0], order, *lowered.orders[2:])))
