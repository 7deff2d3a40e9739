"""What a weight that layers share holds for a time: its later gradient waits where one backward passes all of them."""

from __future__ import annotations

import pytest

from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import Degrees, Optimizer, Plan, Recompute, TrainingJob
from stagewright.planner.prediction import Evaluation, evaluate
from stagewright.testing import cluster_factory, profile_factory

PARAMETERS = 1_000_000
WEIGHT = 4.0 * PARAMETERS
WORKSPACE, OUTPUT = 10 * WEIGHT, 2.0**20
SIZES = {"parameters": PARAMETERS, "microbatches": (1,), "activation_bytes": 1.0, "workspace_bytes": WORKSPACE}
TIED = profile_factory(4, tied=[(0, 3)], **SIZES)
UNTIED = profile_factory(4, **SIZES)


def plan_of(profile, num_stages: int, **degrees: int) -> Plan:
    job = TrainingJob(
        global_batch=2, sequence_length=128, precision="fp32", optimizer=Optimizer.standard("sgd", "fp32")
    )
    choice = Choice(Degrees(**degrees), num_stages, 1, 1, "gpipe", Recompute.NONE)
    return even_plan(profile, cluster_factory(num_stages * degrees.get("dp", 1), 1), job, choice)


def scored(profile, num_stages: int, **degrees: int) -> Evaluation:
    return evaluate(plan_of(profile, num_stages, **degrees), profile)


def workspaces(profile, num_stages: int) -> list[float]:
    return [float(value) for stage in scored(profile, num_stages).stage_bytes for value in stage.workspace]


def test_in_stages_apart_no_gradient_of_a_shared_weight_waits():
    """Of the first layer's workspace one gradient is left: the other two were that which waited, and the sum."""
    first, *between, last = workspaces(TIED, 2)
    assert first == WORKSPACE - 2 * WEIGHT
    assert between == [WORKSPACE - WEIGHT] * 2
    assert last == WORKSPACE
    assert workspaces(TIED, 1) == workspaces(UNTIED, 2) == [WORKSPACE] * 4


def test_a_first_layer_keeps_room_for_its_own_gradient_and_that_of_its_output():
    small = profile_factory(4, tied=[(0, 3)], **{**SIZES, "workspace_bytes": 2 * WEIGHT})
    assert workspaces(small, 2)[0] == WEIGHT + OUTPUT


def test_under_zero_3_a_weight_that_layers_of_a_stage_share_is_whole_beside_all_of_them():
    tied, untied = (scored(profile, 1, dp=2, zero=3).stage_bytes[0] for profile in (TIED, UNTIED))
    assert (untied.at_once, untied.whole.tolist()) == (0.0, [WEIGHT] * 4)
    assert (tied.at_once, tied.whole.tolist()) == (WEIGHT, [0.0, WEIGHT, WEIGHT, 0.0])


@pytest.mark.parametrize("zero", [2, 3])
def test_under_zero_a_shared_gradient_waits_beside_those_of_the_layers_between_and_leaves_at_the_first(zero):
    tied, untied = (scored(profile, 1, dp=2, zero=zero).stage_bytes[0].phases for profile in (TIED, UNTIED))
    assert tied[3] == ()
    for layer, beside in ((0, WEIGHT), (1, WEIGHT), (2, WEIGHT)):
        for own, alone in zip(tied[layer], untied[layer], strict=True):
            assert own.gradients == alone.gradients
            assert own.begin - alone.begin in (0.0, beside)
    assert sum(phase.gradients for phases in tied for phase in phases) == 3 * WEIGHT
