"""Plans in other frameworks' files: what they say agrees with the plan, and what they cannot say is listed."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from stagewright.cli.main import run
from stagewright.formats.deepspeed import deepspeed
from stagewright.formats.exporters import EXPORTERS
from stagewright.formats.megatron_args import layout_text, megatron_args
from stagewright.formats.torch_csv import parse_torch_csv
from stagewright.formats.torchtitan import torchtitan
from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import Degrees, Plan, Recompute, TrainingJob
from stagewright.planner.documents.job import Optimizer
from stagewright.planner.errors import NotExpressible
from stagewright.planner.planned_schedule import schedule_of


def plan_of(model, degrees, ranks, *, chunks=1, family="1f1b", recompute=Recompute.NONE, batch=64):
    profile = resolve_model(model)
    nodes = -(-degrees.num_devices * ranks // 8)
    job = TrainingJob(global_batch=batch, sequence_length=2048)
    choice = Choice(degrees, ranks, chunks, 1, family, recompute)
    return even_plan(profile, resolve_cluster(f"a100-sxm-80g:8x{nodes}"), job, choice), profile


def arguments(exported):
    lines = exported.files["megatron_args.txt"].splitlines()
    return {line.split(" ", 1)[0]: line.split(" ", 1)[1] if " " in line else None for line in lines}


def read_layout(text):
    """Return (embeddings, layers, heads) of each stage of a Megatron layout, as Megatron's own grammar reads it."""
    stages = []
    for part in text.split("|"):
        spelled = re.sub(r"([EtmL])\*(\d+)", lambda match: match[1] * int(match[2]), part)
        stages.append((spelled.count("E"), spelled.count("t"), spelled.count("L")))
    return stages


def test_megatrons_arguments_say_the_plan():
    plan, profile = plan_of(
        "llama3.1-70b", Degrees(tp=8, dp=2, sp=True, zero=1, vocab_parallel=True), 4, recompute=Recompute.FULL
    )
    exported = megatron_args(plan, profile)
    found = arguments(exported)
    assert exported.is_exact
    assert found["--tensor-model-parallel-size"] == "8"
    assert found["--pipeline-model-parallel-size"] == "4"
    assert found["--global-batch-size"] == "64"
    assert found["--num-query-groups"] == "8"
    assert (found["--recompute-granularity"], found["--recompute-method"]) == ("full", "uniform")
    assert {"--sequence-parallel", "--use-distributed-optimizer", "--swiglu", "--bf16"} <= set(found)
    world = 8 * 4 * plan.stages[0].degrees.dp
    assert world == plan.num_devices


@pytest.mark.parametrize(("chunks", "family"), [(1, "1f1b"), (2, "interleaved")])
def test_a_layout_puts_every_layer_where_the_plan_puts_it(chunks, family):
    plan, profile = plan_of("gpt3-175b", Degrees(tp=8), 4, chunks=chunks, family=family)
    stages = read_layout(layout_text(plan, profile))
    blocks = [
        sum(profile.classes[profile.layer_classes[index]].kind == "block" for index in stage.layer_indices)
        for stage in plan.stages
    ]
    assert [layers for _, layers, _ in stages] == blocks
    assert (stages[0][0], stages[-1][2], sum(blocks)) == (1, 1, 96)
    assert len(stages) == 4 * chunks


def test_what_megatron_runs_otherwise_is_said():
    plan, profile = plan_of("gpt3-175b", Degrees(tp=8), 4)
    other = plan.model_copy(update={"schedule": plan.schedule.model_copy(update={"name": "zb-h1"})})
    loss = next(item for item in megatron_args(other, profile).losses if item.field == "schedule.name")
    assert (loss.status, loss.note) == ("approximated", "Megatron-LM runs 1f1b instead of zb-h1")
    folded = plan.schedule.model_copy(update={"placement": ((0, 1, 3, 2),)})
    with pytest.raises(NotExpressible, match=r"placement \(0, 1, 3, 2\)"):
        megatron_args(plan.model_copy(update={"schedule": folded}), profile)


def test_deepspeeds_configuration_multiplies_to_the_batch():
    plan, profile = plan_of("llama2-7b", Degrees(tp=2, dp=8, zero=2), 1)
    exported = deepspeed(plan, profile)
    config = json.loads(exported.files["ds_config.json"])
    product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 8
    assert product == config["train_batch_size"] == 64
    assert config["zero_optimization"]["stage"] == 2
    assert (config["bf16"], config["tensor_parallel"]) == ({"enabled": True}, {"autotp_size": 2})
    assert exported.is_exact


@pytest.mark.parametrize(("name", "type_"), [("adamw", "AdamW"), ("adam", "Adam"), ("sgd", "SGD"), ("muon", None)])
def test_deepspeed_is_told_the_optimizer_of_the_plan_or_the_loss_is_named(name, type_):
    plan, profile = plan_of("llama2-7b", Degrees(dp=2), 1)
    job = plan.job.model_copy(update={"optimizer": Optimizer.standard(name, "bf16")})
    exported = deepspeed(plan.model_copy(update={"job": job}), profile)
    config = json.loads(exported.files["ds_config.json"])
    assert config.get("optimizer", {}).get("type") == type_
    assert exported.is_exact == (type_ is not None)


def test_deepspeeds_pipeline_holds_every_layer_once_and_refuses_zero_2():
    plan, profile = plan_of("llama2-7b", Degrees(dp=2, zero=1), 4)
    pipeline = json.loads(deepspeed(plan, profile).files["pipeline.json"])
    assert [name for stage in pipeline["stages"] for name in stage] == list(profile.layer_names)
    wrong, _ = plan_of("llama2-7b", Degrees(dp=2, zero=2), 4)
    with pytest.raises(NotExpressible, match="ZeRO 2 with 4 pipeline ranks"):
        deepspeed(wrong, profile)


@pytest.mark.parametrize("name", EXPORTERS)
def test_the_command_writes_every_format(name, tmp_path, capsys):
    plan, _ = plan_of("llama2-7b", Degrees(dp=2), 4)
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "deep" / "out"
    assert run(["export", str(tmp_path / "plan.json"), "--to", name, "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert sorted(answer) == ["files", "losses"]
    assert sorted(answer["files"]) == sorted(str(path) for path in out.iterdir())
    assert Plan.load(tmp_path / "plan.json") == plan


def test_strict_refuses_a_loss_and_writes_nothing(tmp_path, capsys):
    plan, _ = plan_of("llama2-7b", Degrees(dp=2), 4)
    plan.save(tmp_path / "plan.json")
    command = ["export", str(tmp_path / "plan.json"), "--to", "torch-csv", "--out", str(tmp_path / "out"), "--strict"]
    assert run([*command, "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["error"]["field"] == "stages"
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_names_the_nearest(tmp_path, capsys):
    plan, _ = plan_of("llama2-7b", Degrees(dp=2), 4)
    plan.save(tmp_path / "plan.json")
    assert run(["export", str(tmp_path / "plan.json"), "--to", "megatron", "--out", str(tmp_path), "--json"]) == 2
    assert "did you mean megatron-args" in json.loads(capsys.readouterr().out)["error"]["hint"]


def recipe_of(exported):
    """Run a torchtitan recipe on a blank configuration and return what it sets."""
    config = SimpleNamespace(
        training=SimpleNamespace(), parallelism=SimpleNamespace(), activation_checkpoint=SimpleNamespace()
    )
    text = exported.files["recipe.py"]
    scope = {"Trainer": SimpleNamespace(Config=SimpleNamespace)}
    exec("\n".join(line for line in text.splitlines() if not line.startswith("from torchtitan")), scope)
    return scope["apply"](config), scope["WORLD_SIZE"]


@pytest.mark.parametrize(
    ("model", "degrees", "ranks"),
    [
        ("llama3.1-70b", Degrees(tp=8, dp=2, cp=2, sp=True, zero=3, vocab_parallel=True), 4),
        ("llama3.1-8b", Degrees(dp=8), 1),
        ("llama3.1-8b", Degrees(dp=8, zero=2), 1),
        ("mixtral-8x7b", Degrees(tp=2, dp=4, ep=8, sp=True, zero=3, vocab_parallel=True), 2),
    ],
)
def test_torchtitans_degrees_pass_its_own_checks_and_are_the_plans(model, degrees, ranks):
    """ParallelDims: dp_replicate dp_shard cp tp pp is the world, and ep divides dp_shard cp tp."""
    plan, profile = plan_of(model, degrees, ranks)
    config, world = recipe_of(torchtitan(plan, profile))
    set_to = config.parallelism
    replicate, shard = set_to.data_parallel_replicate_degree, set_to.data_parallel_shard_degree
    cp, tp = set_to.context_parallel_degree, set_to.tensor_parallel_degree
    assert replicate * shard * cp * tp * set_to.pipeline_parallel_degree == world == plan.num_devices
    assert (shard * cp * tp) % set_to.expert_parallel_degree == 0
    assert (replicate * shard, cp, tp, set_to.expert_parallel_degree) == (
        degrees.dp,
        degrees.cp,
        degrees.tp,
        degrees.ep,
    )
    assert (replicate, shard) == ((degrees.dp, 1) if degrees.zero == 0 else (1, degrees.dp))
    local = config.training.local_batch_size
    accumulated = config.training.global_batch_size // (local * degrees.dp)
    microbatches = local // getattr(set_to, "pipeline_parallel_microbatch_size", local)
    assert accumulated * microbatches == plan.schedule.num_microbatches
    assert config.training.seq_len == 2048


def test_torchtitans_stages_hold_every_module_once_and_its_schedule_is_the_plans():
    plan, profile = plan_of(
        "llama3.1-70b", Degrees(tp=8, sp=True, vocab_parallel=True), 4, chunks=2, family="interleaved"
    )
    exported = torchtitan(plan, profile)
    config, _ = recipe_of(exported)
    stages = config.parallelism.module_fqns_per_model_part
    assert len(stages) == 8
    assert [name for stage in stages for name in stage] == [
        "tok_embeddings",
        *(f"layers.{index}" for index in range(80)),
        "norm",
        "output",
    ]
    written = parse_torch_csv(exported.files["schedule.csv"])
    planned = schedule_of(plan.schedule)
    assert [list(written.actions(rank)) for rank in range(4)] == [list(planned.actions(rank)) for rank in range(4)]
    assert config.parallelism.pipeline_parallel_schedule == "PipelineScheduleMulti"


def test_what_torchtitan_cannot_say_is_listed_or_refused():
    plan, profile = plan_of("llama3.1-8b", Degrees(tp=2, dp=4, sp=True, zero=1), 1)
    losses = {loss.field: loss for loss in torchtitan(plan, profile).losses}
    assert losses["degrees.zero"].status == "approximated"
    assert "ZeRO-2" in losses["degrees.zero"].note
    assert losses["degrees.vocab_parallel"].status == "approximated"
    plan, profile = plan_of("gpt3-175b", Degrees(tp=8), 4, family="chimera")
    with pytest.raises(NotExpressible, match="replicas of a stage"):
        torchtitan(plan, profile)


@pytest.mark.parametrize("name", ["megatron-args", "deepspeed", "torchtitan"])
@pytest.mark.parametrize(("field", "value"), [("batch_shares", (3, 1)), ("optimizer_offload", 0.5)])
def test_unlike_parts_of_a_stages_devices_are_refused_and_not_left_out(name, field, value):
    plan, profile = plan_of("llama2-7b", Degrees(dp=2, zero=1), 1)
    (stage,) = plan.stages
    unlike = plan.model_copy(update={"stages": (stage.model_copy(update={field: value}),)})
    with pytest.raises(NotExpressible, match=rf"stages\[0\].{field} is "):
        EXPORTERS[name](unlike, profile)
