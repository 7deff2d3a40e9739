"""What shards of a run add up, seen in one microbatch: sizes, what full recomputation repeats, what has a backward."""

import json

import pytest
import torch

from stagewright.profiler.model_source import ModelSource
from stagewright.profiler.tensor_sums import layer_sums

pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HIDDEN_BYTES = 2 * 8 * 16 * 4


def sums_of(tmp_path, kind, **fields):
    """The sums of a shard of two for two samples of eight tokens, by layer."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, **fields}))
    source, device = ModelSource(str(path)), torch.device("cpu")
    model = source.build(device=device, dtype=torch.float32, tensor_degree=2)
    chain = source.split(model)
    return dict(
        zip((layer.name for layer in chain.layers), layer_sums(chain, source.batch(model, 2, 8, device)), strict=True)
    )


@pytest.mark.parametrize(
    ("kind", "fields", "again"),
    [
        ("llama", {}, [True, False]),
        ("olmo2", {}, [True, True]),  # its norms stand behind attention and feed-forward
        ("gpt2", {"resid_pdrop": 0.0}, [True, False]),
        ("gpt2", {"resid_pdrop": 0.5}, [True, True]),  # a dropout's mask is saved
        ("gptj", {"rotary_dim": 4, "resid_pdrop": 0.0}, [True, False]),  # both parts from one norm
        ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 4}, [True]),  # experts stay whole
    ],
)
def test_a_sum_is_repeated_where_anything_is_saved_behind_it(tmp_path, kind, fields, again):
    found = sums_of(tmp_path, kind, **SIZES, **fields)
    blocks = [own for name, own in found.items() if name[-1].isdigit()]
    assert [[each.again for each in own] for own in blocks] == [again] * 2
    assert {each.num_bytes for own in blocks for each in own} == {HIDDEN_BYTES}
    assert all(each.has_backward for own in blocks for each in own)


def test_a_decoder_that_is_one_layer_adds_up_its_own_embedding_and_all_its_rows(tmp_path):
    found = sums_of(
        tmp_path, "t5", **SIZES, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    names = [each.path.rpartition(".")[2] for each in found["decoder"]]
    assert names == ["embed_tokens", *["o", "o", "wo"] * 2]
    assert {each.num_bytes for each in found["decoder"]} == {HIDDEN_BYTES}
    assert [(each.path, each.num_bytes) for each in found["lm_head"]] == [("lm_head", HIDDEN_BYTES)], "what enters it"


def test_a_tower_of_images_has_sizes_of_its_own_and_a_block_that_nothing_uses(tmp_path):
    vision = {**SIZES, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    text = {**SIZES, "model_type": "llama"}
    found = sums_of(tmp_path, "llava", text_config=text, vision_config=vision, image_token_index=5, image_seq_length=4)
    first, last = (found[f"model.vision_tower.encoder.layers.{index}"] for index in (0, 1))
    assert {each.num_bytes for each in (*first, *last)} == {2 * 5 * 16 * 4}
    assert [each.has_backward for each in (*first, *last)] == [True, True, False, False]


def test_a_model_without_a_tensor_plan_has_none(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 8))
    source = ModelSource(None, model)
    chain = source.split(model)
    batch = source.batch(model, 2, 8, torch.device("cpu"))
    assert layer_sums(chain, batch) == [[] for _ in chain.layers]
