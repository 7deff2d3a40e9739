"""Tensor parallelism of every model type that the planner makes profiles of: gradients and weights of one process."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from model_types import CONFIGS
from runtime_cases import Case, prepare

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
