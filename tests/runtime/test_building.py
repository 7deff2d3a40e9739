"""Models and batches that a run gets from a Hugging Face configuration alone."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from runtime_documents import plan_of, profile_of  # noqa: E402

from stagewright.cli.inputs import is_config  # noqa: E402
from stagewright.modeling import split  # noqa: E402
from stagewright.modeling.hugging_face import huggingface_model  # noqa: E402
from stagewright.planner.documents import Degrees  # noqa: E402
from stagewright.planner.errors import InvalidArgument, InvalidDocument  # noqa: E402
from stagewright.runtime.building import build_model, refuse_other_layers, split_as_profiled  # noqa: E402
from stagewright.runtime.data import open_data  # noqa: E402

VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 16, "num_hidden_layers": 2}
VIT |= {"num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 4, "num_labels": 3}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(VIT))
    return str(path)


def test_a_configuration_is_built_cut_and_fed_like_any_model(config):
    assert is_config(config)
    chain = split(huggingface_model(config))
    profile = profile_of(chain)
    plan = plan_of(chain, profile, "1f1b", 2, 2)
    model = build_model(config, plan, seed=3)
    assert split_as_profiled(model, config, profile, plan, torch.device("cpu")).layer_names == chain.layer_names
    again = build_model(config, plan, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_split_tensors_of_a_model_that_does_not_say_how_are_refused_before_a_rank_starts(tmp_path):
    path = tmp_path / "config.json"
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 36, "bos_token_id": 0, "eos_token_id": 0}
    path.write_text(json.dumps({"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], **sizes}))
    chain = split(huggingface_model(str(path)))
    profile = profile_of(chain)
    refuse_other_layers(str(path), profile, plan_of(chain, profile, "1f1b", 2, 2))
    with pytest.raises(InvalidArgument, match="OpenAIGPTLMHeadModel has no tensor-parallel plan"):
        refuse_other_layers(str(path), profile, plan_of(chain, profile, "1f1b", 2, 2, degrees=Degrees(tp=2)))


def test_ranks_refuse_a_model_of_other_layers_that_only_they_can_build(config, tmp_path):
    factory = tmp_path / "valued.py"
    factory.write_text(
        "from torch import nn\n"
        "def build():\n"
        "    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))\n"
        "    assert model[0].weight.sum().item() != 0.0\n"
        "    return model\n"
    )
    chain = split(huggingface_model(config))
    profile = profile_of(chain)
    plan = plan_of(chain, profile, "1f1b", 2, 2)
    reference = f"{factory}:build"
    refuse_other_layers(reference, profile, plan)
    with pytest.raises(InvalidDocument, match="has layers sha256:"):
        split_as_profiled(build_model(reference, plan, seed=0), reference, profile, plan, torch.device("cpu"))


def test_guessed_batches_are_the_same_on_every_rank_and_leave_random_numbers_alone(config):
    model = huggingface_model(config)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = (open_data(None, config, model, samples=2, sequence_length=4) for _ in range(2))
    batches = [next(first), next(first)]
    assert torch.equal(torch.rand(1), expected)
    assert batches[0]["pixel_values"].shape == (2, 3, 8, 8)
    assert torch.equal(batches[0]["pixel_values"], next(second)["pixel_values"])
    assert not torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    assert torch.isfinite(model(**batches[0]).loss)


def test_a_plan_or_a_profile_is_no_configuration_and_an_unknown_model_is_named(tmp_path, config):
    other = tmp_path / "plan.json"
    other.write_text("{}")
    assert not is_config(str(other))
    assert not is_config(str(tmp_path / "absent.json"))
    assert is_config(str(tmp_path))
    other.write_text('{"model_type": "no-such"}')
    with pytest.raises(InvalidArgument, match="not a known Hugging Face configuration"):
        huggingface_model(str(other))
