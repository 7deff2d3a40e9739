"""Varuna: the knee, the best balanced depth by simulation, and the same batch on the devices that are left."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.documents import Degrees, Plan, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planners.varuna import knee
from stagewright.planner.planning import make_plan
from stagewright.planner.search.brute_force import all_partitions
from stagewright.planner.search.problem import Partition, Problem
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

PROFILE = profile_factory(
    6,
    forward_s=[2e-3, 1e-3, 1e-3, 2e-3, 1e-3, 3e-3],
    parameters=20_000_000,
    activation_bytes=4e6,
    output_bytes=1e5,
    microbatches=(1, 2),
)
CLUSTER = cluster_factory(8, 1, bytes_per_s=20e9)
JOB = TrainingJob(
    global_batch=24,
    sequence_length=128,
    precision="fp32",
    space=SearchSpace(schedules=("1f1b",), zero=(0,), pins=Pins(tp=1)),
)


def _found(num_devices: int) -> Plan:
    plan = make_plan(PROFILE, CLUSTER, JOB, planner="varuna", num_devices=num_devices, top=0).plan
    assert plan is not None
    return plan


def test_the_knee_is_the_smallest_microbatch_that_is_nearly_as_fast_a_sample():
    assert knee({1: 1.0, 2: 1.2, 4: 2.1, 8: 4.0}) == 4
    assert knee({1: 1.0, 2: 2.0, 4: 4.0}) == 1


@pytest.mark.parametrize("num_devices", [8, 6])
def test_the_plan_is_the_fastest_of_all_depths_and_the_batch_stays_when_devices_go(num_devices):
    """From eight devices to six: another depth or replica count, the same samples in a step."""
    plan = _found(num_devices)
    spec, degrees = plan.schedule, plan.stages[0].degrees
    assert spec.microbatch * spec.num_microbatches * degrees.dp == JOB.global_batch
    assert plan.num_devices <= num_devices
    problem = Problem(PROFILE, CLUSTER, JOB, num_devices)
    full = (2,) * PROFILE.num_layers
    steps = {}
    for candidate in problem.candidates():
        configuration = candidate.configuration
        if configuration.microbatch != 1 or configuration.degrees != Degrees(dp=configuration.degrees.dp):
            continue
        load = problem.costs(configuration).time_s + problem.costs(configuration).recompute_s[2]
        loads = np.concatenate(([0.0], np.cumsum(load)))
        cuts = all_partitions(PROFILE.num_layers, configuration.num_ranks)
        balanced = min(cuts, key=lambda bounds: round(float(np.diff(loads[list(bounds)]).max()), 12))
        steps[candidate.summary] = problem.step_s(candidate, Partition(balanced, full))
    assert len(steps) >= 6
    assert plan.prediction.step_time_s == pytest.approx(min(steps.values()), rel=0.02)


def test_six_of_eight_devices_are_used_as_well_as_they_can_be():
    eight, six = _found(8), _found(6)
    assert eight.prediction.step_time_s < six.prediction.step_time_s < 1.6 * eight.prediction.step_time_s
