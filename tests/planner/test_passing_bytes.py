"""What optimizer steps and ZeRO hold for a time, on plans that a hand can add up."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.memory_actions import widened_elements
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import Degrees, Optimizer, Plan, Recompute, StagePlan, TrainingJob
from stagewright.planner.documents.operator import Architecture
from stagewright.planner.documents.profile import WeightTensor
from stagewright.planner.expectation import peak_bytes, peaks_by_device
from stagewright.planner.layerwise import layerwise_schedule
from stagewright.planner.prediction import evaluate
from stagewright.planner.schedules.action import Kind
from stagewright.testing import cluster_factory, profile_factory

LAYERS, PARAMETERS = 4, 1_000_000
PROFILE = profile_factory(LAYERS, forward_s=1e-3, parameters=PARAMETERS, microbatches=(1,), activation_bytes=1.0)


def plan_of(kind: str, *, optimizer: str = "adamw", precision: str = "fp32", **degrees: int) -> Plan:
    """Return one stage over two replicas."""
    cluster = cluster_factory(2, 1)
    (group,) = cluster.groups
    device = group.device.model_copy(update={"kind": kind, "host_bytes_per_s": 10e9})
    cluster = cluster.model_copy(update={"groups": (group.model_copy(update={"device": device}),)})
    job = TrainingJob(
        global_batch=2, sequence_length=128, precision=precision, optimizer=Optimizer.standard(optimizer, precision)
    )
    return even_plan(PROFILE, cluster, job, Choice(Degrees(dp=2, **degrees), 1, 1, 1, "gpipe", Recompute.NONE))


@pytest.mark.parametrize(
    ("kind", "optimizer", "zero", "copies"),
    [
        ("cuda", "adamw", 1, 0.5),  # square roots of the whole shard
        ("cpu", "adamw", 1, 1.5),  # gloo's copy of all gradients and a shard of them, more than two copies of the shard
        ("cuda", "sgd-momentum", 1, 0.5),  # a shard of the gradients arrives, a shard of the weights leaves
        ("cuda", "sgd-momentum", 0, 0.0),
        ("cpu", "adamw", 2, 2 * 0.5 / LAYERS),  # a layer after the other
    ],
)
def test_a_step_needs_what_its_optimizer_and_its_shards_make(kind, optimizer, zero, copies):
    evaluation = evaluate(plan_of(kind, optimizer=optimizer, zero=zero), PROFILE)
    assert evaluation.step_bytes.tolist() == pytest.approx([copies * LAYERS * PARAMETERS * 4])


@pytest.mark.parametrize(
    ("kind", "optimizer", "copies", "elements"),
    [
        ("cpu", "adamw", 1 + 2, 2**20),  # the widened gradients of a piece, and two copies
        ("cuda", "adamw", 1 + 1, LAYERS * PARAMETERS),
        ("cpu", "sgd-momentum", 1, 2**20),
    ],
)
def test_a_step_on_narrow_gradients_widens_a_piece(kind, optimizer, copies, elements):
    plan = plan_of(kind, optimizer=optimizer, precision="bf16")
    assert evaluate(plan, PROFILE).step_bytes.tolist() == [copies * 4.0 * elements]
    assert elements == min(LAYERS * PARAMETERS, widened_elements(kind))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_masters_come_from_the_host_together_and_moments_in_pieces(share):
    """Of two shards of 500,000 a layer: all their masters, and of a shard two moments, its wide gradient and two copies."""
    plan = plan_of("cpu", precision="bf16", zero=3)
    stage = plan.stages[0].model_copy(update={"optimizer_offload": share})
    evaluation = evaluate(plan.model_copy(update={"stages": (stage,)}), PROFILE)
    shard = PARAMETERS / 2
    assert evaluation.step_bytes[0] == 4 * share * LAYERS * shard + (8 + 4 + 8) * share * shard
    kept, gathered = evaluation.stage_bytes[0], evaluate(plan, PROFILE).stage_bytes[0]
    assert (gathered.copied - kept.copied).tolist() == pytest.approx([2 * shard] * LAYERS)


def test_gradients_of_divided_experts_and_of_the_rest_are_scattered_at_once():
    """Half of the parameters are experts', over 2 x 2 devices: a quarter of the rest with gloo's copy of all, half of a half of them."""
    classes = {
        name: layer.model_copy(update={"expert_parameters": PARAMETERS // 2}) for name, layer in PROFILE.classes.items()
    }
    update = {"classes": classes, "architecture": Architecture(num_experts=2, experts_per_token=1)}
    profile, cluster = PROFILE.model_copy(update=update), plan_of("cpu").cluster
    (group,) = cluster_factory(4, 1).groups
    (own,) = cluster.groups
    cluster = cluster.model_copy(update={"groups": (group.model_copy(update={"device": own.device}),)})
    optimizer = Optimizer.standard("sgd-momentum", "fp32")
    job = TrainingJob(global_batch=4, sequence_length=128, precision="fp32", optimizer=optimizer)
    choice = Choice(Degrees(dp=4, ep=2, zero=1), 1, 1, 1, "gpipe", Recompute.NONE)
    found = evaluate(even_plan(profile, cluster, job, choice), profile).step_bytes
    dense, experts = 0.5 / 4 * (1 + 4), 0.25 / 2 * (1 + 2)
    assert found.tolist() == [pytest.approx((dense + experts) * LAYERS * PARAMETERS * 4)]


@pytest.mark.parametrize(("zero", "sharded"), [(0, 0), (1, 4), (2, 8), (3, 12)])
def test_experts_that_nothing_divides_are_sharded_with_the_rest_of_their_layer(zero, sharded):
    """12 bytes a parameter over dp 2 and tp 2: what ZeRO shards, of experts too, is halved over the replicas of the weights."""
    sizes = {"forward_s": 1e-3, "parameters": PARAMETERS, "microbatches": (1,), "activation_bytes": 1.0}
    profile = profile_factory(LAYERS, **sizes, tensor_degrees=(1, 2))
    classes = {
        name: layer.model_copy(update={"expert_parameters": PARAMETERS // 2}) for name, layer in profile.classes.items()
    }
    profile = profile.model_copy(
        update={"classes": classes, "architecture": Architecture(num_experts=2, experts_per_token=1)}
    )
    optimizer = Optimizer.standard("sgd-momentum", "fp32")
    job = TrainingJob(global_batch=2, sequence_length=128, precision="fp32", optimizer=optimizer)
    choice = Choice(Degrees(dp=2, tp=2, zero=zero), 1, 1, 1, "gpipe", Recompute.NONE)
    evaluation = evaluate(even_plan(profile, cluster_factory(4, 1), job, choice), profile)
    held = LAYERS * PARAMETERS * (1 / 2 / 2 + 1 / 2)  # half are experts', whole on each device; tp divides the rest
    assert evaluation.pipeline.static_bytes.sum() == pytest.approx((12 - sharded / 2) * held)
    assert not evaluation.unlike_bytes.any()


def test_where_few_activations_live_the_step_is_the_peak():
    evaluation = evaluate(plan_of("cpu", zero=1), PROFILE)
    states = evaluation.pipeline.static_bytes.sum() + evaluation.pipeline.base_bytes
    assert peak_bytes(evaluation)[0] == pytest.approx(float(np.max(states + evaluation.step_bytes)))


def test_the_owner_of_most_states_needs_most_for_its_step():
    """Two copies of three quarters of the parameters against two of one; equal shares would be sent in copies."""
    plan = plan_of("cpu", zero=1)
    stage = plan.stages[0].model_copy(update={"state_shares": (0.75, 0.25)})
    first, second = peaks_by_device(plan.model_copy(update={"stages": (stage,)}), PROFILE)
    states = 8 * 0.5 * LAYERS * PARAMETERS  # two moments
    assert first - second == pytest.approx(states + 2 * 4 * 0.5 * LAYERS * PARAMETERS, rel=1e-6)


@pytest.mark.parametrize(("kind", "on_its_way"), [("cuda", 1.5), ("cpu", 2.5)])
def test_a_backward_under_zero_2_makes_one_layers_gradients_while_anothers_are_on_their_way(kind, on_its_way):
    """Activations of a byte: whole gradients of a layer, and beside them those of the layer behind, scattered to a shard."""
    whole = peak_bytes(evaluate(plan_of(kind, optimizer="sgd", zero=1), PROFILE))[0]
    found = peak_bytes(evaluate(plan_of(kind, optimizer="sgd", zero=2), PROFILE))[0]
    one = 4.0 * PARAMETERS
    spared = LAYERS * one / 2  # half of the gradients that stay under stage 1
    step = evaluate(plan_of(kind, optimizer="sgd", zero=1), PROFILE).step_bytes[0]
    assert found - whole == pytest.approx((1.0 + on_its_way) * one - spared - step, abs=100 * LAYERS)


@pytest.mark.parametrize(
    ("precision", "measured_bytes", "expected"),
    [
        ("bf16", 2e6 + 40_000, 40_000),  # a workspace, on processors with units for bf16
        ("bf16", 6e6, 4e6),  # what it is rounded from, on others
        ("fp32", 4e6 - 500, 0),  # operands that are gone by then
    ],
)
def test_a_late_weight_gradient_takes_beside_its_product_what_the_profile_measured(precision, measured_bytes, expected):
    """It was taken to be four bytes a number in bf16 on all processors: a GPT under ZB-V and ZeRO-3 was 6 % high on some."""
    tensors = (
        WeightTensor(shape=(3, 1000, 2000), is_matrix=True, of_experts=True),  # a stack, which never waits
        WeightTensor(shape=(1000, 1000), is_matrix=True),
    )
    classes = {
        name: layer.model_copy(
            update={
                "tensors": tensors,
                "costs": tuple(
                    cost.model_copy(update={"weight_grad_workspace_bytes": measured_bytes}) for cost in layer.costs
                ),
            }
        )
        for name, layer in PROFILE.classes.items()
    }
    profile = PROFILE.model_copy(update={"classes": classes})
    (stage,) = evaluate(plan_of("cpu", precision=precision, zero=3), profile).stage_bytes
    assert stage.beside_product.tolist() == pytest.approx([expected] * LAYERS)


def test_a_stage_gathers_no_layer_of_another():
    """A small layer in a stage of its own: a search counts the model's largest layer beside it, a run never has that."""
    sizes = [PARAMETERS, 10 * PARAMETERS]
    profile = profile_factory(2, forward_s=1e-3, parameters=sizes, microbatches=(1,), activation_bytes=1.0)
    plan = plan_of("cuda", zero=3)
    degrees = (Degrees(dp=2, zero=3), Degrees(dp=2))
    stages = tuple(StagePlan(layers=(index, index + 1), degrees=each) for index, each in enumerate(degrees))
    update = {"num_layers": 2, "layer_digest": profile.layer_digest, "stages": stages}
    plan = plan.model_copy(update={**update, "schedule": layerwise_schedule(2, 1, 1)})
    found = evaluate(plan, profile).stage_bytes[0].need(Kind.F, 1.0)
    assert found == pytest.approx(4.0 * PARAMETERS, rel=0.01)
