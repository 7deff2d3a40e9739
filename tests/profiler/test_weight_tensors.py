"""The shapes of a layer's tensors in a profile."""

from __future__ import annotations

from itertools import pairwise

import pytest

pytest.importorskip("torch")

from examples.gpt import GPT, VOCABULARY
from stagewright.modeling import split
from stagewright.planner.documents import WeightTensor
from stagewright.profiler.model_shapes import weight_tensors


def test_tensors_of_a_layer_are_told_by_shape_and_matrices_of_blocks_from_all_else():
    chain = split(GPT(width=8, num_blocks=2, num_heads=2, context=4, tied=False))
    found = {layer.kind: weight_tensors(chain)[layer.name] for layer in chain.layers}
    assert WeightTensor(shape=(VOCABULARY, 8)) in found["embedding"]
    assert found["head"] == (WeightTensor(shape=(VOCABULARY, 8)),)
    block = {(tensor.shape, tensor.count) for tensor in found["block"] if tensor.is_matrix}
    assert block == {((24, 8), 1), ((8, 8), 1), ((32, 8), 1), ((8, 32), 1)}
    for layer in chain.layers:
        assert sum(each.count * each.num_elements for each in weight_tensors(chain)[layer.name]) == layer.num_parameters


def test_tensors_follow_each_other_as_in_the_layer_in_runs_of_one_shape():
    chain = split(GPT(width=8, num_blocks=2, num_heads=2, context=4, tied=False))
    named = dict(chain.model.named_parameters())
    for layer in chain.layers:
        runs = weight_tensors(chain)[layer.name]
        shapes = [each.shape for each in runs for _ in range(each.count)]
        assert shapes == [tuple(named[name].shape) for name in layer.parameters]
        assert all((a.shape, a.is_matrix) != (b.shape, b.is_matrix) for a, b in pairwise(runs))


def test_frozen_tensors_are_not_stepped():
    chain = split(GPT(width=8, num_blocks=2, num_heads=2, context=4, tied=False))
    head = next(layer for layer in chain.layers if layer.kind == "head")
    chain.model.head.weight.requires_grad_(False)
    assert weight_tensors(chain)[head.name] == ()


def test_experts_that_lie_in_a_stack_are_a_stack_of_matrices_and_their_vectors_are_none():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    chain = split(transformers.MixtralForCausalLM(config))
    block, _ = [layer for layer in chain.layers if layer.kind == "block"]
    experts = {each.shape: each.is_matrix for each in weight_tensors(chain)[block.name] if each.of_experts}
    assert experts == {(4, 48, 16): True, (4, 16, 24): True}
