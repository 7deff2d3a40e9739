"""Analytic profiles from configs: parameters to the unit, structure, and errors that name the field."""

import pytest

from stagewright.planner.catalog import model_entries, resolve_cluster, resolve_model
from stagewright.planner.cost import CostModel
from stagewright.planner.documents import Degrees, ModelProfile, TrainingJob
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.models.hugging_face import MODEL_TYPES, profile_from_config

ENTRIES = {entry.name: entry for entry in model_entries()}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.parameters is not None])
def test_parameters_are_the_published_number_to_the_unit(name):
    entry = ENTRIES[name]
    assert entry.profile().num_parameters - entry.prediction_parameters == entry.parameters


def test_the_catalogue_holds_the_families_people_ask_for():
    assert len(ENTRIES) >= 25
    assert sum(entry.parameters is not None for entry in ENTRIES.values()) >= 55
    for name in (
        "gpt3-175b",
        "megatron-1008b",
        "megatron-22b",
        "bloom-176b",
        "vgg-16",
        "resnet-50",
        "gnmt",
        "t5-11b",
        "vit-b-16",
    ):
        assert name in ENTRIES


@pytest.mark.parametrize(
    ("name", "billions"),
    [("megatron-1.7b", 1.7), ("megatron-39.1b", 39.1), ("megatron-529.6b", 529.6), ("gpt3-175b", 175)],
)
def test_rounded_published_sizes_are_met(name, billions):
    assert ENTRIES[name].profile().num_parameters / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_every_model_of_the_catalogue_is_a_document_that_can_be_priced(name):
    profile = ENTRIES[name].profile()
    assert ModelProfile.from_object(profile.model_dump(mode="json")) == profile
    table = CostModel(profile, resolve_cluster("h100-sxm:8x1"), TrainingJob(global_batch=8, sequence_length=256)).table(
        Degrees(), 1
    )
    assert (table.forward_s >= 0).all()
    assert (table.forward_s + table.weight_grad_s + table.input_grad_s > 0).all()
    assert table.dense_parameters.sum() + table.expert_parameters.sum() == pytest.approx(
        sum(profile.classes[kind].parameters for kind in profile.layer_classes)
    )
    assert (table.output_bytes > 0).all()


def test_grouped_heads_shrink_keys_and_values_only():
    grouped = profile_from_config(LLAMA, "tiny")
    full = profile_from_config({**LLAMA, "num_key_value_heads": 4}, "tiny")
    assert full.num_parameters - grouped.num_parameters == 3 * 2 * 64 * 32
    assert grouped.architecture.num_kv_heads == 2


def test_tied_embeddings_count_once_and_are_declared():
    free, tied = profile_from_config(LLAMA, "tiny"), profile_from_config({**LLAMA, "tie_word_embeddings": True}, "tiny")
    assert free.num_parameters - tied.num_parameters == 96 * 64
    assert tied.tied[0].layers == ("embedding", "head")
    assert not free.tied


def test_a_sliding_window_saves_attention_and_keeps_parameters():
    plain = profile_from_config({**LLAMA, "model_type": "mistral"}, "tiny")
    windowed = profile_from_config({**LLAMA, "model_type": "mistral", "sliding_window": 128}, "tiny")
    job = TrainingJob(global_batch=1, sequence_length=4096)

    def flops(profile):
        return CostModel(profile, resolve_cluster("h100-sxm:1x1"), job).table(Degrees(), 1).model_flops.sum()

    assert windowed.num_parameters == plain.num_parameters
    assert flops(windowed) < flops(plain)


def test_first_layers_of_a_mixture_are_dense_and_experts_are_counted_apart():
    profile = resolve_model("deepseek-v2-lite")
    assert profile.layer_classes[1] == "dense_block"
    assert profile.layer_classes[2] == "expert_block"
    expert = profile.classes["expert_block"]
    assert expert.expert_parameters == 64 * 3 * 2048 * 1408
    assert profile.architecture.num_dense_layers == 1
    assert profile.architecture.kv_lora_rank == 512


def test_multi_token_prediction_adds_a_layer_and_a_second_pass_of_the_head():
    entry = ENTRIES["deepseek-v3"]
    with_prediction = entry.profile()
    without = profile_from_config({**entry.config, "num_nextn_predict_layers": 0}, "plain")
    assert without.num_parameters == entry.parameters
    assert with_prediction.num_parameters - without.num_parameters == entry.prediction_parameters
    assert "predictions.0" in with_prediction.layer_names or "prediction" in with_prediction.layer_classes
    heads = [profile.classes["head"].operators[-1].flops_per_token for profile in (with_prediction, without)]
    assert heads[0] == 2 * heads[1]
    assert with_prediction.is_chain


def test_an_encoder_decoder_is_a_graph_whose_decoder_reads_the_encoder():
    profile = resolve_model("t5-small")
    assert not profile.is_chain
    names = profile.layer_names
    targets = [names[target] for source, target in profile.edge_indices if names[source] == "encoder_norm"]
    assert targets == [f"decoder.{index}" for index in range(6)]


def test_a_vision_tower_and_a_language_model_join_in_one_layer():
    profile = resolve_model("llava-1.5-7b")
    names = profile.layer_names
    into_merge = {names[source] for source, target in profile.edge_indices if names[target] == "merge"}
    assert into_merge == {"projector", "embedding"}
    # The tower sees its patches whatever the sequence length is.
    cluster = resolve_cluster("h100-sxm:8x1")
    short, long = (
        CostModel(profile, cluster, TrainingJob(global_batch=1, sequence_length=s)).table(Degrees(), 1)
        for s in (1024, 2048)
    )
    tower = names.index("tower.0")
    assert short.forward_s[tower] == long.forward_s[tower]
    assert short.forward_s[names.index("blocks.0")] < long.forward_s[names.index("blocks.0")]


def test_convolutional_networks_have_the_published_operations():
    # He et al. and Simonyan and Zisserman: 4.1 and 15.5 billion multiply-adds for an image of 224 x 224.
    for name, billions in (("resnet-50", 4.09), ("vgg-16", 15.47)):
        profile = resolve_model(name)
        table = CostModel(profile, resolve_cluster("v100:8x1"), TrainingJob(global_batch=1, sequence_length=1)).table(
            Degrees(), 1
        )
        assert table.model_flops.sum() / 2e9 == pytest.approx(billions, rel=0.01)
        assert profile.is_chain


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"model_type": "lama"}, "model_type", "did you mean llama"),
        ({"model_type": None}, "model_type", "no model_type"),
        ({"hidden_size": None}, "hidden_size", "no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size", "'64'"),
        ({"hidden_size": -64}, "hidden_size", "-64"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "is 0"),
        ({"num_attention_heads": 5}, "hidden_size", "64 does not divide by num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads", "4 does not divide by num_key_value_heads 3"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings", "true or false"),
        ({"vocab_size": True}, "vocab_size", "True"),
    ],
)
def test_a_bad_field_is_named_with_its_value(change, field, text):
    with pytest.raises(InvalidDocument) as error:
        profile_from_config({**LLAMA, **change}, "tiny")
    assert error.value.field == field
    assert text in f"{error.value.message} {error.value.hint}"


def test_what_is_no_object_is_refused():
    with pytest.raises(InvalidDocument, match="this is a list"):
        profile_from_config([], "tiny")
    assert "llama" in MODEL_TYPES


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "0.1"])
def test_a_dropout_that_is_no_probability_is_named(value):
    config = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 96, "resid_pdrop": value}
    with pytest.raises(InvalidDocument, match="resid_pdrop"):
        profile_from_config(config, "tiny")
