"""Alpa's inter-operator pass: its oracles, and T* as GPipe's simulated step."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.planners.alpa import inter_operator
from stagewright.planner.planners.stage_table import ranges_of
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.simulation.simulate import StageCosts, simulate

UNIT = ranges_of(np.ones(8))


def test_eight_unit_layers_on_four_devices_one_at_a_time_take_22():
    found = inter_operator(UNIT[None], [1], 4, 8)
    assert found is not None
    assert found.value == 8 + 7 * 2 == 22
    assert found.bounds == (0, 2, 4, 6, 8)


def test_with_perfect_scaling_inside_a_stage_one_stage_on_four_devices_takes_16():
    found = inter_operator(np.stack([UNIT, UNIT / 2, UNIT / 4]), [1, 2, 4], 4, 8)
    assert found is not None
    assert found.value == 2 + 7 * 2 == 16
    assert found.stages == ((0, 8, 2),)


def test_activations_in_flight_decide_which_stages_fit():
    # each layer keeps one unit a microbatch, a device has 5: with 4 stages the first may hold one layer only
    room = np.floor(5.0 / ranges_of(np.ones(8)))
    found = inter_operator(UNIT[None], [1], 4, 8, most_in_flight=room[None])
    assert found is not None
    assert all((end - first) * (4 - stage) <= 5 for stage, (first, end, _) in enumerate(found.stages))
    assert found.value == 8 + 7 * 4


@pytest.mark.parametrize("seed", range(5))
def test_t_star_is_the_simulated_step_of_gpipe(seed):
    forward = np.random.default_rng(seed).uniform(0.5, 1.5, 6)
    found = inter_operator(ranges_of(3 * forward)[None], [1], 3, 5)
    assert found is not None
    stages = np.array([forward[first:end].sum() for first, end, _ in found.stages])
    schedule = generate("gpipe", ScheduleRequest(3, 5))
    assert simulate(
        schedule, StageCosts(stages, stages, stages, *np.zeros((3, len(stages))))
    ).makespan_s == pytest.approx(found.value, rel=1e-12)
