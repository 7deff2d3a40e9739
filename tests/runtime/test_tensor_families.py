"""Tensor parallelism of every model type that the planner makes profiles of: gradients and weights of one process, and
the bytes that the analytic profile predicts."""

from __future__ import annotations

import json
from functools import partial

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from model_types import CONFIGS, without_dropout
from planned_problems import on_processors
from runtime_cases import Case, prepare
from test_planned_problems import failures, launch_on_pool

from stagewright.modeling import split
from stagewright.modeling.hugging_face import huggingface_model
from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import Degrees, Recompute, TrainingJob
from stagewright.planner.models.hugging_face import profile_from_config
from stagewright.planner.prediction import with_prediction
from stagewright.profiler.analytic_layers import over_layers
from stagewright.profiler.model_profile import profile_model
from stagewright.runtime import run
from stagewright.testing import cluster_factory

pytestmark = pytest.mark.ranks

# Norms, scores and the loss of these run in fp32 whatever the type; where sums are split, they are rounded elsewhere.
IN_FP32 = 5e-6
EXACT = ("bert", "bloom", "dbrx", "falcon", "gpt2", "gpt_neox", "gpt_oss", "gptj")
PLAIN, SEQUENCE, VOCABULARY = {}, {"sp": True}, {"vocab_parallel": True}
QUICK = [
    ("gpt2", SEQUENCE),  # a transposed weight, queries, keys and values in three parts
    ("phi3", PLAIN),  # in parts of unequal size
    ("deepseek_v3", PLAIN),  # latents
    ("olmo2", PLAIN),  # a norm over all heads
    ("opt", SEQUENCE),  # columns in the block itself
    ("t5", PLAIN),  # a bias by heads
    ("gemma2", VOCABULARY),  # an embedding that scales
]
# Five tokens of an image do not divide, PhiMoE's routing draws random numbers for the tokens of a rank, ViT has no vocabulary.
NOT_FOR = [("llava", SEQUENCE), ("phimoe", SEQUENCE), ("vit", VOCABULARY)]
EVERY = [
    (name, options)
    for name in CONFIGS
    for options in (PLAIN, SEQUENCE, VOCABULARY)
    if (name, options) not in [*NOT_FOR, *QUICK]
]


def assert_equal(rank_pools, name, degrees, *, schedule="gpipe", pipeline=1):
    case = Case(schedule, pipeline, 2, degrees=degrees, dtype="float64", hugging_face=f"type/{name}", microbatch=4)
    pool = rank_pools(case.world)
    limit = IN_FP32 if "vocab_parallel" in degrees or name.partition("/")[0] not in EXACT else 1e-10
    for result in pool.run("gradients_and_weights", prepare(case, pool.next_number())):
        assert result.gradients.max_relative_error <= limit, result
        assert result.weights.max_relative_error <= limit, result


@pytest.mark.parametrize(("name", "options"), QUICK, ids=str)
def test_each_kind_of_split_equals_one_process(rank_pools, name, options):
    assert_equal(rank_pools, name, {"tp": 2, **options})


@pytest.mark.soak
@pytest.mark.parametrize(("name", "options"), EVERY, ids=str)
def test_a_model_type_split_over_two_ranks_equals_one_process(rank_pools, name, options):
    assert_equal(rank_pools, name, {"tp": 2, **options})


@pytest.mark.soak
@pytest.mark.parametrize("name", ["cohere/norms", "gpt_oss", "llama", "olmo2", "qwen3"])
def test_two_key_value_heads_and_their_norms_over_four_ranks_equal_one_process(rank_pools, name):
    assert_equal(rank_pools, name, {"tp": 4})


@pytest.mark.soak
@pytest.mark.parametrize("name", ["bloom", "deepseek_v3", "falcon/alibi", "gpt2", "opt", "phi3", "t5"])
def test_split_stages_of_a_pipeline_whose_backwards_are_split_equal_one_process(rank_pools, name):
    assert_equal(rank_pools, name, {"tp": 2}, schedule="zb-h1", pipeline=2)


LAST_IN_FRONT = ("bloom", "gpt2", "llama", "phi3")  # nothing is saved behind the last sum of a block
LAST_BEHIND = ("gemma2", "gemma3_text", "mixtral", "olmo2", "qwen2_moe", "t5")  # a norm is, or the experts are
MEASURED = ("bloom", "deepseek_v3", "gpt2", "gpt_oss", "olmo2", "phi3", "qwen3")
# Not OPT, whose keys' biases have a gradient of zero in theory, nor types whose layers are not those of their analytic profile.
PLANNED = (
    "bloom", "cohere", "dbrx", "deepseek_v3/one query", "falcon", "falcon/alibi", "falcon/groups", "gemma", "gpt2",
    "gptj", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2", "olmoe", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe",
)  # fmt: skip


def assert_sends_what_is_predicted(
    rank_pools, monkeypatch, directory, name, options, *, recompute=Recompute.NONE, is_measured=False, checks=None
):
    monkeypatch.setattr(run, "launch", partial(launch_on_pool, rank_pools))
    config = {"model_type": name.partition("/")[0], **CONFIGS[name], **without_dropout(name)}
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    if is_measured:
        grid = {"microbatches": (1, 2, 4), "sequence_length": 16, "tensor_degrees": (1, 2)}
        profile = profile_model(str(path), **grid, device="cpu", dtype="fp32", budget_s=0.0)
    else:
        profile = over_layers(profile_from_config(config, "small"), split(huggingface_model(str(path))))
    job = TrainingJob(global_batch=8, sequence_length=16, precision="fp32")
    degrees = Degrees(tp=2, **options)
    choice = Choice(degrees, 1, 1, 4 // degrees.dp, "1f1b", recompute)
    cluster = on_processors(cluster_factory(degrees.num_devices, 1))
    plan = with_prediction(even_plan(profile, cluster, job, choice), profile)
    checks = checks or ("gradients", "traffic", *(("memory",) if is_measured else ()))
    report = run.run_plan(plan, profile, model=str(path), steps=1, checks=checks, directory=directory / "run")
    assert report.passed, failures(report)
    assert "memory" not in checks or abs(report.error["peak_memory_max"]) < 0.1, failures(report)


@pytest.mark.parametrize("options", [PLAIN, SEQUENCE], ids=str)
def test_latents_of_a_planned_configuration_send_what_is_predicted(rank_pools, monkeypatch, tmp_path, options):
    assert_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, "deepseek_v3", options)


@pytest.mark.soak
@pytest.mark.parametrize("options", [PLAIN, SEQUENCE, VOCABULARY], ids=str)
@pytest.mark.parametrize("name", PLANNED)
def test_a_planned_configuration_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, name, options):
    assert_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, name, options)


@pytest.mark.soak
@pytest.mark.parametrize("options", [PLAIN, SEQUENCE], ids=str)
@pytest.mark.parametrize("name", ["deepseek_v3", "falcon", "gpt2", "olmo2", "phi3", "qwen3"])
def test_a_recomputed_configuration_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, name, options):
    assert_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, name, options, recompute=Recompute.FULL)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name in MEASURED for options in (PLAIN, SEQUENCE, VOCABULARY)),
        *(("t5", options) for options in (PLAIN, SEQUENCE, VOCABULARY)),  # its decoder is one layer, embedding and all
    ],
    ids=str,
)
def test_a_measured_model_holds_and_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, name, options):
    assert_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, name, options, is_measured=True)


@pytest.mark.soak
@pytest.mark.parametrize("options", [PLAIN, SEQUENCE], ids=str)
@pytest.mark.parametrize("name", [*LAST_IN_FRONT, *LAST_BEHIND])
def test_a_recomputed_measured_model_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, name, options):
    told = {"recompute": Recompute.FULL, "is_measured": True, "checks": ("traffic",)}
    assert_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, name, options, **told)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", VOCABULARY),  # has none
        ("llava", PLAIN),  # a tower of its own width, whose last block nothing uses
    ],
    ids=str,
)
def test_a_measured_model_of_images_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, name, options):
    """Keys' biases have a gradient of zero in theory: gradients are compared in fp64 above."""
    told = {"is_measured": True, "checks": ("traffic",)}
    assert_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, name, options, **told)


@pytest.mark.soak
@pytest.mark.parametrize("options", [{}, VOCABULARY], ids=str)
def test_sharded_layers_of_a_measured_model_are_gathered_as_often_as_predicted(
    rank_pools, monkeypatch, tmp_path, options
):
    """T5's blocks hand a bias of positions through, and its decoder has the shared embedding, whole or split."""
    told = {"is_measured": True, "checks": ("gradients", "traffic")}
    assert_sends_what_is_predicted(rank_pools, monkeypatch, tmp_path, "t5", {"dp": 2, "zero": 3, **options}, **told)
