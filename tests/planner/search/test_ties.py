"""Layers tied to one stage: the plan is the best of those that keep them together."""

from __future__ import annotations

from itertools import combinations

import pytest

from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.planning import make_plan
from stagewright.planner.search.problem import Partition, Problem
from stagewright.planner.search.verify import verify_certificate
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

PROFILE = profile_factory(
    7,
    forward_s=[1e-3, 2e-3, 1e-3, 3e-3, 1e-3, 1e-3, 2e-3],
    parameters=5_000_000,
    activation_bytes=4e6,
    output_bytes=1e5,
)
CLUSTER = cluster_factory(3, 1)


def _job(**space: object) -> TrainingJob:
    chosen = {"schedules": ("1f1b", "gpipe"), "pins": Pins(pp=3, microbatch=1), **space}
    return TrainingJob(global_batch=6, sequence_length=128, precision="fp32", space=SearchSpace(**chosen))  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [(0, 2), (3, 4), (2, 5), (1, 2)])
def test_a_plan_with_tied_layers_is_the_best_of_all_that_keep_them_together(tied: tuple[int, int]) -> None:
    names = PROFILE.layer_names
    found = make_plan(PROFILE, CLUSTER, _job(ties=((names[tied[0]], names[tied[1]]),)), gap=0.0)
    problem = Problem(PROFILE, CLUSTER, _job(), 3)
    together = {cuts for cuts in combinations(range(1, 7), 2) if not any(tied[0] < cut <= tied[1] for cut in cuts)}
    least = min(
        problem.step_s(candidate, Partition((0, *cuts, 7), (0,) * 7))
        for candidate in problem.candidates()
        for cuts in together
    )
    assert found.status == "optimal"
    assert found.objective_s == pytest.approx(least, rel=1e-9)
    assert found.plan is not None
    assert any(stage.layers[0] <= tied[0] and tied[1] < stage.layers[1] for stage in found.plan.stages)
    assert found.plan.certificate is not None
    assert found.plan.certificate.space["tied"] == [f"{names[tied[0]]} = {names[tied[1]]}"]
    verify_certificate(found.plan, PROFILE)


def test_ties_that_leave_fewer_blocks_than_pinned_stages_have_no_plan() -> None:
    names = PROFILE.layer_names
    found = make_plan(PROFILE, CLUSTER, _job(ties=((names[0], names[5]),)), gap=0.0)
    assert found.status == "infeasible"


def test_a_tied_name_that_is_no_layer_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidArgument, match="no layer"):
        make_plan(PROFILE, CLUSTER, _job(ties=(("embeding", PROFILE.layer_names[1]),)))
