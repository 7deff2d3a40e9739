"""Stages of different numbers of replicas (DAPPLE): microbatches are split and put together between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
from runtime_cases import Case, make_model, prepare
from runtime_documents import plan_of, profile_of
from runtime_models import TinyModel
from test_schedules import assert_equal_to_one_process

from stagewright.modeling import split
from stagewright.planner.documents import Degrees, StagePlan
from stagewright.planner.planners.dapple import DappleProblem, dapple_pipeline
from stagewright.planner.prediction import with_prediction
from stagewright.runtime.topology import Part, Topology

pytestmark = pytest.mark.ranks

CASES = [
    Case("1f1b", 2, 4, replicas=(1, 3), microbatch=3, dropout=0.0),
    Case("zb-h1", 2, 4, replicas=(3, 1), microbatch=1, dropout=0.0, dtype="float64", clip_norm=0.05),
    Case("gpipe", 3, 3, replicas=(1, 2, 1), dropout=0.0, dtype="float64", degrees={"zero": 1}, tied=False),
    Case("1f1b", 3, 5, replicas=(2, 1, 1), dropout=0.0, recompute=("full",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.schedule}-{case.replicas}")
def test_stages_with_replicas_of_their_own_equal_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


def test_the_plan_that_dapples_planner_makes_with_replicas_of_its_own_for_each_stage_runs_as_one_process(rank_pools):
    """On machines of 2 and 1 devices with a slow link between them, the recurrence gives each machine one stage."""
    case = Case("1f1b", 2, 8, replicas=(2, 1), dropout=0.0, dtype="float64", tied=False, microbatch=1)
    chain = split(make_model(case, 4))
    profile = profile_of(chain)
    costs = [profile.classes[name].costs[0] for name in profile.layer_classes]
    pipeline = dapple_pipeline(
        DappleProblem(
            forward_s=np.array([cost.forward_s for cost in costs]),
            backward_s=np.array([cost.input_grad_s + cost.weight_grad_s for cost in costs]),
            weight_bytes=np.array([4.0 * layer.num_parameters for layer in chain.layers]),
            boundary_bytes=np.array([cost.output_bytes for cost in costs[:-1]]),
            machines=(2, 1),
            num_microbatches=8,
            inside_bytes_per_s=1e8,
            across_bytes_per_s=1e6,
        )
    )
    assert [stage.num_devices for stage in pipeline.stages] == [2, 1]
    pool = rank_pools(3)
    prepared = prepare(case, pool.next_number())
    stages = tuple(
        StagePlan(layers=(stage.first, stage.end), degrees=Degrees(dp=stage.num_devices)) for stage in pipeline.stages
    )
    plan = with_prediction(prepared.plan.model_copy(update={"stages": stages}), profile)
    assert plan.prediction.step_time_s >= pipeline.latency_s  # L is at most the simulated step
    for result in pool.run("gradients_and_weights", replace(prepared, plan=plan)):
        assert result.gradients.max_relative_error <= 1e-10
        assert result.weights.max_relative_error <= 1e-10


def test_two_and_three_replicas_exchange_the_samples_that_they_share():
    chain = split(TinyModel(3))
    plan = plan_of(chain, profile_of(chain), "1f1b", 2, 4, microbatch=3, replicas=(2, 3))
    assert Topology(plan, 0).parts(0, 1) == (Part(2, 0, 2), Part(3, 2, 1))
    assert Topology(plan, 1).parts(0, 1) == (Part(3, 0, 1), Part(4, 1, 2))
    assert Topology(plan, 3).parts(0, 0) == (Part(0, 0, 1), Part(1, 1, 1))
    assert Topology(plan, 3).parts(0, 1) == (Part(3, 0, 2),)
