"""A plan that the runtime does not execute is refused before a rank starts, with the field that is the reason."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_documents import plan_of, profile_of
from runtime_models import TinyModel

from stagewright.modeling import split
from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import Degrees, Optimizer, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.errors import InvalidArgument, InvalidDocument
from stagewright.planner.planners.registry import planners
from stagewright.planner.planning import make_plan
from stagewright.runtime.run import run_plan
from stagewright.runtime.support import (
    check_layerwise_model,
    check_memory,
    check_shared_weights,
    check_split_logits,
    check_supported,
)


def with_shares(plan, *shares):
    """The plan whose stages take these shares, the last one for all that are left."""
    stages = tuple(
        stage.model_copy(update={"batch_shares": shares[min(index, len(shares) - 1)]})
        for index, stage in enumerate(plan.stages)
    )
    return plan.model_copy(update={"stages": stages})


def documents(**degrees):
    chain = split(TinyModel(3))
    profile = profile_of(chain)
    return plan_of(chain, profile, "1f1b", 2, 4, degrees=Degrees(**degrees)), profile


def test_plans_of_equal_degrees_are_taken():
    check_supported(documents()[0])
    check_supported(documents(dp=2, tp=2, sp=True, zero=3)[0])
    check_supported(documents(dp=4, ep=2, zero=2)[0])


@pytest.mark.parametrize("name", ["1f1b-vocab", "pipefb"])
def test_schedules_whose_stages_no_model_has_are_refused_with_the_reason(name):
    plan, _ = documents()
    named = plan.schedule.model_copy(update={"name": name})
    with pytest.raises(InvalidArgument, match=f"{name} is planned and simulated, and not run: .+"):
        check_supported(plan.model_copy(update={"schedule": named}))


def test_uneven_shares_are_taken_without_split_experts_where_they_sum_up_to_a_microbatch():
    plan, _ = documents(dp=2)
    check_supported(with_shares(plan, (1, 3)))
    with pytest.raises(InvalidDocument, match=r"batch_shares \[1, 2\] are 2 shares of 3 samples"):
        check_supported(with_shares(plan, (1, 3), (1, 2)))
    with pytest.raises(InvalidArgument, match=r"batch_shares is \[1, 3\] with ep 2"):
        check_supported(with_shares(documents(dp=2, ep=2)[0], (1, 3)))


def with_fields(plan, **fields):
    return plan.model_copy(update={"stages": tuple(stage.model_copy(update=fields) for stage in plan.stages)})


def test_uneven_shares_of_states_are_taken_where_replicas_alone_divide_them():
    check_supported(with_fields(documents(dp=2, zero=1)[0], state_shares=(0.75, 0.25)))
    with pytest.raises(
        InvalidDocument, match=r"state_shares are 2 shares of 1 together, the stage has dp 2 and zero 0"
    ):
        check_supported(with_fields(documents(dp=2)[0], state_shares=(0.75, 0.25)))
    plan = with_fields(documents(dp=2, cp=2, zero=1)[0], state_shares=(0.75, 0.25))
    check_supported(plan)
    divided = plan.schedule.model_copy(update={"parameters": {"shard_size": 2}})
    with pytest.raises(
        InvalidArgument, match=r"stages\[0\].state_shares is \[0.75, 0.25\] with parameters \['shard_size'\]"
    ):
        check_supported(plan.model_copy(update={"schedule": divided}))


@pytest.mark.parametrize("name", ["pipedream", "2bw", "wpipe", "ampnet", "spectrain", "xpipe", "pipemare", "avgpipe"])
def test_weights_that_change_under_microbatches_are_taken_of_one_replica(name):
    for degrees in ({"dp": 2}, {"cp": 2}, {"tp": 2}):
        plan, _ = documents(**degrees)
        delayed = plan.model_copy(update={"schedule": plan.schedule.model_copy(update={"name": name})})
        if degrees == {"tp": 2}:
            check_supported(delayed)
            continue
        with pytest.raises(InvalidArgument, match=rf"stages have \(dp, cp\) .* under {name}") as refusal:
            check_supported(delayed)
        assert refusal.value.field == "stages.degrees.dp"


def test_versions_of_a_weight_that_stages_share_are_refused():
    plan, profile = documents()
    check_shared_weights(plan, profile)
    delayed = plan.model_copy(update={"schedule": plan.schedule.model_copy(update={"name": "xpipe"})})
    with pytest.raises(InvalidArgument, match=r"stages \[0, 1\] share a weight, and xpipe changes weights"):
        check_shared_weights(delayed, profile)


@pytest.mark.parametrize("name", ["muon", "shampoo"])
def test_optimizers_of_whole_matrices_are_taken_under_every_degree_and_synchronous_schedules(name):
    chain = split(TinyModel(3))
    for degrees in ({"dp": 2, "etp": 2}, {"tp": 2, "dp": 2, "zero": 3}):
        plan = plan_of(chain, profile_of(chain), "1f1b", 2, 4, degrees=Degrees(**degrees), optimizer=name)
        check_supported(plan)
    delayed = plan.schedule.model_copy(update={"name": "pipedream"})
    with pytest.raises(InvalidArgument, match=f"optimizer {name} with pipedream"):
        check_supported(plan.model_copy(update={"schedule": delayed}))


def test_states_on_the_host_are_taken_where_single_elements_are_stepped_once_an_iteration():
    plan = with_fields(documents(dp=2, zero=1)[0], optimizer_offload=0.5)
    check_supported(plan)
    delayed = plan.schedule.model_copy(update={"name": "pipedream"})
    with pytest.raises(InvalidArgument, match=r"stages\[0\].optimizer_offload is 0.5 with adamw, pipedream"):
        check_supported(plan.model_copy(update={"schedule": delayed}))


def test_divided_slices_of_a_divided_sequence_are_refused():
    plan, _ = documents(cp=2)
    sliced = plan.schedule.model_copy(update={"num_slices": 2})
    with pytest.raises(InvalidArgument, match="divided one way only"):
        check_supported(plan.model_copy(update={"schedule": sliced}))


def with_degrees(plan, *degrees):
    stages = tuple(
        stage.model_copy(update={"degrees": Degrees(**own)}) for stage, own in zip(plan.stages, degrees, strict=True)
    )
    return plan.model_copy(update={"stages": stages})


def test_stages_that_differ_in_any_degree_are_taken_one_a_rank():
    plan, _ = documents(dp=2)
    check_supported(with_degrees(plan, {"dp": 2}, {"dp": 2, "zero": 3}))
    check_supported(with_degrees(plan, {"dp": 2}, {"cp": 2}))
    check_supported(with_degrees(plan, {"dp": 2, "ep": 2}, {"tp": 2, "etp": 2}))


def test_stages_of_different_numbers_of_replicas_are_taken_with_other_degrees():
    chain = split(TinyModel(3))
    profile = profile_of(chain)
    check_supported(plan_of(chain, profile, "1f1b", 2, 4, microbatch=3, replicas=(1, 3)))
    check_supported(plan_of(chain, profile, "1f1b", 2, 4, microbatch=3, replicas=(1, 3), degrees=Degrees(cp=2)))
    local = plan_of(chain, profile, "1f1b", 2, 4, microbatch=3, replicas=(1, 3), parameters={"local_steps": 2})
    with pytest.raises(InvalidArgument, match=r"\[1, 3\] replicas of tp \[1, 1\] and cp \[1, 1\], .*\['local_steps'\]"):
        check_supported(local)


@pytest.mark.parametrize("name", ["gradient", "speed"])
def test_an_unknown_check_is_refused(name):
    plan, profile = documents()
    with pytest.raises(InvalidArgument, match=f"no check '{name}'"):
        run_plan(plan, profile, model="nothing:imported", checks=(name,))


def test_a_plan_that_does_not_fit_its_devices_is_refused_with_both_numbers():
    plan, _ = documents()
    memory = plan.cluster.groups[0].device.memory_bytes
    check_memory(plan, (memory, memory))
    with pytest.raises(InvalidArgument, match=r"pipeline rank 1 needs 160\.0 GiB, its device has 74\.5"):
        check_memory(plan, (memory, 160 * 2**30))


def test_another_number_of_ranks_than_the_plans_is_refused_before_a_rank_starts():
    plan, profile = documents()
    with pytest.raises(InvalidArgument, match=r"1 nodes x 3 ranks = 3, the plan has 2"):
        run_plan(plan, profile, model="nothing:imported", torchrun_arguments=("--nproc-per-node=3",))


def plans_of(outcome):
    return [plan for plan in (outcome.plan, *(other.plan for other in outcome.alternatives)) if plan is not None]


def assert_taken(outcome, profile):
    """Of each plan of an answer, ask all that `run` asks before a rank starts."""
    assert outcome.plan
    for plan in plans_of(outcome):
        check_supported(plan)
        check_shared_weights(plan, profile)
        check_layerwise_model(plan, profile)
        check_split_logits(plan, profile)


@pytest.mark.parametrize("name", [row.name for row in planners() if row.name != "exhaustive"])
def test_what_a_planner_returns_is_taken(name):
    job, profile = TrainingJob(global_batch=16, sequence_length=512), resolve_model("gpt2")
    assert_taken(make_plan(profile, resolve_cluster("a100-sxm-40g:4x1"), job, planner=name), profile)


MIXED = "a100-sxm-40g:4x1+v100-sxm-16g:4x1"


@pytest.mark.parametrize(
    ("model", "cluster", "optimizer"),
    [
        ("mixtral-8x7b", "h100-sxm:8x4", "adamw"),  # 8 experts on 32 replicas, ZeRO-3
        ("qwen1.5-moe-a2.7b", "a100-sxm-40g:8x1", "muon"),
        ("llama2-13b", "a100-sxm-40g:8x1", "muon"),
        ("gpt2-xl", "a100-sxm-40g:8x1", "shampoo"),
        ("gpt2-xl", MIXED, "adamw"),
        ("llama2-7b", MIXED, "adamw"),
    ],
)
def test_what_the_exact_planner_returns_is_taken(model, cluster, optimizer):
    profile = resolve_model(model)
    job = TrainingJob(
        global_batch=64, sequence_length=1024, optimizer=Optimizer.standard(optimizer, "bf16"), precision="bf16"
    )
    assert_taken(make_plan(profile, resolve_cluster(cluster), job), profile)


@pytest.mark.parametrize(
    ("planner", "model", "cluster", "optimizer", "space"),
    [
        ("exact", "qwen1.5-moe-a2.7b", "v100-sxm-16g:4x4", "muon", {"pins": Pins(etp=4, zero=1)}),
        ("exact", "olmoe-1b-7b", "a100-sxm-80g:8x1", "shampoo", {"pins": Pins(etp=2, zero=3)}),
        ("alpa", "gnmt", "a100-sxm-80g:8x2", "shampoo", {"pins": Pins(tp=2)}),
        ("mist", "gpt2", "v100-sxm-16g:4x4", "shampoo", {"per_stage_degrees": True, "pins": Pins(tp=2)}),
        ("galvatron", "gpt2-xl", "a100-sxm-40g:4x1", "shampoo", {"per_stage_degrees": True}),
        # Plans that no run takes were among these: pools are searched alike, and models that are no chain not by layer.
        ("exact", "llava-1.5-7b", "a100-sxm-80g:2x1+v100-sxm-32g:4x2", "sgd-momentum", {"pins": Pins(dp=2)}),
        ("galvatron", "gnmt", "a100-sxm-40g:2x1", "adamw", {"per_stage_degrees": True}),
    ],
)
def test_what_a_planner_returns_to_problems_whose_plans_were_refused_is_taken(
    planner, model, cluster, optimizer, space
):
    profile = resolve_model(model)
    job = TrainingJob(
        global_batch=16,
        sequence_length=1024,
        optimizer=Optimizer.standard(optimizer, "bf16"),
        precision="bf16",
        space=SearchSpace(**space),
    )
    assert_taken(make_plan(profile, resolve_cluster(cluster), job, planner=planner, gap=0.25), profile)


def test_plans_for_mixed_devices_split_a_shared_weight_alike_and_the_certificate_says_so():
    profile = resolve_model("gemma-2b")
    optimizer = Optimizer.standard("sgd-momentum", "fp32")
    job = TrainingJob(global_batch=16, sequence_length=1024, optimizer=optimizer, precision="fp32")
    outcome = make_plan(profile, resolve_cluster("a100-sxm-40g:1x1+v100-sxm-16g:2x1"), job)
    assert_taken(outcome, profile)
    assert "but for tp and vocab_parallel" in str(outcome.plan.certificate.space)


def test_a_plan_whose_stages_divide_sequences_unlike_is_taken_as_the_exact_planner_returns_it():
    profile = resolve_model("mixtral-8x7b")
    job = TrainingJob(
        global_batch=256, sequence_length=4096, optimizer=Optimizer.standard("adamw", "bf16"), precision="bf16"
    )
    outcome = make_plan(profile, resolve_cluster("a100-sxm-80g:8x2+v100-sxm-32g:8x4"), job)
    assert any(len({stage.degrees.cp for stage in plan.stages}) > 1 for plan in plans_of(outcome))
    assert_taken(outcome, profile)
