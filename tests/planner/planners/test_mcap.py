"""mCAP: the partition of least peak memory."""

from __future__ import annotations

import pytest

from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planning import make_plan
from stagewright.planner.search.brute_force import all_partitions
from stagewright.planner.search.problem import Partition, Problem
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_fullest_device_holds_least_of_all_partitions(ranks):
    profile = profile_factory(
        parameters=[3_000_000, 200_000, 900_000, 1_500_000, 100_000, 2_500_000, 700_000],
        activation_bytes=[2e6, 9e6, 5e6, 3e6, 8e6, 1e6, 6e6],
        workspace_bytes=[0, 3e6, 0, 1e6, 0, 0, 2e6],
    )
    cluster = cluster_factory(ranks, 1)
    space = SearchSpace(schedules=("1f1b",), pins=Pins(pp=ranks, microbatch=1))
    job = TrainingJob(global_batch=6, sequence_length=128, precision="fp32", space=space)
    found = make_plan(profile, cluster, job, planner="mcap", top=0)
    problem = Problem(profile, cluster, job, ranks)
    candidate = problem.candidates()[0]
    peaks = [
        problem.pipeline(candidate, Partition(bounds, (0,) * 7)).peak_bytes.max() - problem.base_bytes
        for bounds in all_partitions(7, ranks)
        if problem.fits(candidate, Partition(bounds, (0,) * 7))
    ]
    assert found.own_objective == pytest.approx(min(peaks), rel=1e-12)
    assert max(found.plan.prediction.peak_memory_bytes) == pytest.approx(min(peaks) + problem.base_bytes, rel=1e-12)
