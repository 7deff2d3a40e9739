"""Every generator at random sizes: a message that states the rule, or a schedule that runs, and no faster than its bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.lowering import lower
from stagewright.planner.schedules.lowering.messages import joint_edges
from stagewright.planner.schedules.registry import families, generate
from stagewright.planner.simulation.bound import work_bound
from stagewright.planner.simulation.implied_shares import implied_shares
from stagewright.planner.simulation.nccl import check_nccl
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate

NAMES = sorted(row.name for row in families())

requests = st.tuples(
    st.sampled_from(NAMES),
    st.integers(1, 8),
    st.integers(1, 20),
    st.sampled_from([None, None, None, 1, 2, 3, 4]),
    st.sampled_from([1, 1, 1, 1, 2, 3]),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([0.0, 0.3]),
)


def check(case):
    name, ranks, microbatches, chunks, slices, waves, latency_s = case
    request = ScheduleRequest(
        ranks,
        microbatches,
        num_chunks=chunks,
        num_slices=slices,
        num_waves=waves if name == "wave" else None,
        latency_s=latency_s,
        parameters={"effort": 0.0},
    )
    try:
        schedule = generate(name, request)
    except InvalidArgument as refusal:
        assert any(character.isdigit() for character in refusal.message), refusal.message
        return
    validate(schedule)
    share = max(1, schedule.num_stages // schedule.num_ranks)
    costs = StageCosts.uniform(schedule.num_stages, num_chunks=share)
    shares = implied_shares(schedule)
    links = Links(latency_s=latency_s)
    makespan_s = simulate(schedule, costs, links=links, shares=shares).makespan_s
    bound_s = work_bound(schedule, costs, latency_s=latency_s, microbatch_time=shares.microbatch_time)
    assert bound_s <= makespan_s * (1 + 1e-9)
    lowered = lower(schedule, costs, data_parallel=True, links=links, shares=shares, merge="none")
    check_nccl(lowered)
    after_s = simulate(lowered, costs, links=links, shares=shares).makespan_s
    if joint_edges(schedule) == schedule.edges:
        assert after_s == pytest.approx(makespan_s, rel=1e-9)
    else:  # messages wait for others that leave together with them
        assert after_s >= makespan_s * (1 - 1e-9)


@given(requests)
@settings(max_examples=120)
def test_a_generator_refuses_with_numbers_or_makes_a_schedule_that_runs(case):
    check(case)


@pytest.mark.soak
@given(requests)
@settings(max_examples=10_000)
def test_a_generator_refuses_with_numbers_or_makes_a_schedule_that_runs_at_the_full_count(case):
    check(case)
