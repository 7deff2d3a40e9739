"""The work bound never exceeds a simulated makespan, and meets it where no order could do better."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.simulation.bound import work_bound
from stagewright.planner.simulation.network import Links, Shares
from stagewright.planner.simulation.simulate import simulate
from tests.planner.simulation.random_schedules import one_f_one_b, schedules


@given(schedules())
@settings(max_examples=100)
def test_no_random_schedule_ends_before_its_bound(case):
    check_no_random_schedule_ends_before_its_bound(case)


@pytest.mark.soak
@given(schedules())
@settings(max_examples=1000)
def test_no_random_schedule_ends_before_its_bound_at_the_full_count(case):
    check_no_random_schedule_ends_before_its_bound(case)


def check_no_random_schedule_ends_before_its_bound(case) -> None:
    schedule, costs, rng = case
    latency = rng.choice([0.0, 0.5])
    factors = np.array([rng.choice([0.5, 1.0, 2.0]) for _ in range(schedule.num_microbatches)])
    makespan = simulate(schedule, costs, links=Links(latency_s=latency)).makespan_s
    assert work_bound(schedule, costs, latency_s=latency) <= makespan * (1 + 1e-12)
    uneven = simulate(
        schedule, costs, links=Links(latency_s=latency), shares=Shares(microbatch_time=factors)
    ).makespan_s
    assert work_bound(schedule, costs, latency_s=latency, microbatch_time=factors) <= uneven * (1 + 1e-12)


def test_the_bound_of_unit_stages_is_work_plus_the_way_to_the_last_rank():
    assert work_bound(one_f_one_b(4, 8), StageCosts.uniform(4)) == 24 + 3
    assert work_bound(one_f_one_b(4, 8), StageCosts.uniform(4), latency_s=0.5) == pytest.approx(24 + 4.5)


def test_a_single_microbatch_takes_the_whole_chain():
    assert work_bound(one_f_one_b(4, 1), StageCosts.uniform(4)) == 4 + 4 + 1
