"""Shared channels: the same times where nothing is shared, and priorities that keep urgent messages short."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.lowering import lower
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import Schedule, encode
from stagewright.planner.simulation.contention import Channels, simulate_shared
from stagewright.planner.simulation.network import Collectives, Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.timeline import COLLECTIVE_LANE, SEND_LANE
from tests.planner.simulation.random_schedules import schedules


@given(schedules(fused=False, slices=1))
@settings(max_examples=80)
def test_a_channel_for_each_pair_gives_the_times_of_the_other_simulator(case):
    schedule, costs, rng = case
    ranks = schedule.num_ranks
    links = Links(latency_s=0.25, bytes_per_s=rng.choice([2.0, float("inf")]), boundary_bytes=1.0)
    pairs = Channels(send_channel=np.arange(ranks * ranks, dtype=np.int32).reshape(ranks, ranks))
    shared, plain = (
        simulate_shared(schedule, costs, links=links, channels=pairs),
        simulate(schedule, costs, links=links),
    )
    assert shared.makespan_s == pytest.approx(plain.makespan_s, rel=1e-12)
    assert shared.busy_s() == pytest.approx(plain.busy_s())
    assert shared.link_bytes == pytest.approx(plain.link_bytes)


@given(schedules(fused=False, slices=1, replicas=1, dag=False))
@settings(max_examples=40)
def test_collectives_on_wires_of_their_own_give_the_times_of_the_other_simulator(case):
    schedule, costs, _ = case
    lowered = lower(schedule, costs, data_parallel=True, merge="none")
    ranks = schedule.num_ranks
    apart = Channels(
        send_channel=np.arange(ranks * ranks, dtype=np.int32).reshape(ranks, ranks),
        collective_channel=np.arange(ranks, dtype=np.int32) + ranks * ranks,
    )
    collectives = Collectives(reduce_grad_s=1.5, optimizer_s=0.5)
    links = Links(latency_s=0.25)
    shared = simulate_shared(lowered, costs, links=links, collectives=collectives, channels=apart)
    plain = simulate(lowered, costs, links=links, collectives=collectives)
    assert shared.makespan_s == pytest.approx(plain.makespan_s, rel=1e-12)


def two_messages_behind_a_reduction():
    # Rank 0 begins a reduction of 10 s before it has anything to send to rank 1.
    orders = (
        encode([Action(Kind.REDUCE_GRAD, 0), Action(Kind.F, 0, 0), Action(Kind.F, 0, 1)]),
        encode([Action(Kind.F, 1, 0), Action(Kind.F, 1, 1)]),
    )
    return Schedule("custom", 2, np.array([[0, 1]], dtype=np.int32), orders)


@pytest.mark.parametrize(
    ("channels", "makespan"),
    [
        (Channels(), 10 + 0.5 + 1 + 1),  # first come, first served: both messages wait for the whole reduction
        (Channels(collective_priority=1), 10 + 0.5 + 1 + 1),  # urgent, but the reduction is in one piece
        (Channels(quantum_s=1.0), 10 + 0.5 + 1 + 1),  # in pieces, but not more urgent
        (Channels(collective_priority=1, quantum_s=1.0), 2.5 + 0.5 + 1),  # at 1 and, behind the next piece, at 2.5
    ],
)
def test_urgent_messages_go_between_the_pieces_of_a_reduction(channels, makespan):
    timeline = simulate_shared(
        two_messages_behind_a_reduction(),
        StageCosts.uniform(2),
        links=Links(bytes_per_s=2.0, boundary_bytes=1.0),
        collectives=Collectives(reduce_grad_s=10.0),
        channels=channels,
    )
    compute = timeline.end_s[(timeline.rank == 1) & (timeline.lane < SEND_LANE)]
    assert compute.max() == pytest.approx(makespan)
    reducing = timeline.lane == COLLECTIVE_LANE
    assert (timeline.end_s - timeline.start_s)[reducing].sum() == pytest.approx(10.0)


def test_priority_shortens_a_step_whose_reductions_overlap_its_messages():
    schedule = generate("interleaved", ScheduleRequest(4, 8))
    costs = StageCosts.uniform(8, num_chunks=2)
    lowered = lower(schedule, costs, data_parallel=True)
    links = Links(bytes_per_s=10.0, boundary_bytes=1.0)
    steps = [
        simulate_shared(
            lowered, costs, links=links, collectives=Collectives(reduce_grad_s=3.0), channels=channels
        ).makespan_s
        for channels in (Channels(), Channels(collective_priority=1, quantum_s=0.1))
    ]
    assert steps[1] < steps[0]


def test_what_shared_channels_do_not_know_is_refused():
    with pytest.raises(InvalidArgument, match="is fused"):
        simulate_shared(generate("dualpipe", ScheduleRequest(4, 8)), StageCosts.uniform(4))
    with pytest.raises(InvalidArgument, match="quantum_s is 0"):
        Channels(quantum_s=0.0)
