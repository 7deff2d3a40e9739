"""AdaPipe: its knapsack against every choice, its closed form against simulation, and what adapting gains."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stagewright.planner.documents import Recompute, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planners.adapipe import partition_stages
from stagewright.planner.planners.stage_table import StageTable, ranges_of
from stagewright.planner.planning import make_plan
from stagewright.planner.search.brute_force import all_partitions
from stagewright.planner.search.problem import Partition, Problem
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


def four_ranks(memory_bytes: float, num_layers: int = 14) -> Problem:
    draw = np.random.default_rng(num_layers)
    profile = profile_factory(
        num_layers,
        forward_s=draw.uniform(0.5e-3, 2e-3, num_layers).tolist(),
        activation_bytes=draw.uniform(2e6, 9e6, num_layers).tolist(),
        parameters=200_000,
    )
    space = SearchSpace(schedules=("1f1b",), recompute=(Recompute.NONE, Recompute.FULL), pins=Pins(pp=4, microbatch=1))
    job = TrainingJob(global_batch=8, sequence_length=128, precision="fp32", space=space)
    return Problem(profile, cluster_factory(4, 1, memory_bytes=memory_bytes), job, 4)


@pytest.mark.parametrize("in_flight", [1, 2, 4])
@pytest.mark.parametrize("room", [0.3, 0.5, 0.8])
def test_the_knapsack_equals_every_choice_of_fourteen_units(room, in_flight):
    problem = four_ranks(room * in_flight * 14 * 6e6)
    table = StageTable(problem, problem.candidates()[0])
    costs = table.costs
    best = np.inf
    for levels in itertools.product((0, 2), repeat=14):
        at = (np.array(levels), np.arange(14))
        peak = costs.static_bytes.sum() + in_flight * costs.kept_bytes[at].sum() + costs.workspace_bytes[at].max()
        if peak <= table.room_bytes:
            best = min(best, costs.recompute_s[at].sum())
    found = table.least(0, 14, in_flight)
    if np.isinf(best):
        assert found is None
    else:
        assert found is not None
        assert found.seconds == pytest.approx(best, rel=1e-12)


def test_equal_stages_take_33():
    # D = 4, T = 8, F = 1, B = 2: W 10, E 11, (8 - 4) * 3
    found = partition_stages(ranges_of(np.ones(4)), np.stack([ranges_of(2 * np.ones(4))] * 4), 8)
    assert found is not None
    assert found.value == 10 + 11 + 4 * 3 == 33


def test_adapting_by_stage_is_strictly_faster_than_recomputing_uniformly():
    problem = four_ranks(60e6)
    adapted = make_plan(problem.profile, problem.cluster, problem.job, planner="adapipe", top=0)
    candidate = problem.candidates()[0]
    assert not any(problem.fits(candidate, Partition(b, (0,) * 14)) for b in all_partitions(14, 4))
    uniform = {
        bounds: problem.step_s(candidate, Partition(bounds, (2,) * 14))
        for bounds in all_partitions(14, 4)
        if problem.fits(candidate, Partition(bounds, (2,) * 14))
    }
    best = min(uniform, key=uniform.__getitem__)
    assert adapted.objective_s < uniform[best] * 0.95
    levels = [stage.recompute_levels().count(Recompute.FULL) for stage in adapted.plan.stages]
    assert levels[0] > 0
    assert levels[0] >= levels[-1] == 0
    times = adapted.plan.prediction.stage_time_s
    even = problem.pipeline(candidate, Partition(best, (2,) * 14)).costs.sum(axis=0)
    assert max(times) < max(even)
