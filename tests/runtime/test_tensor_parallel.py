"""Tensor parallelism over two and four ranks: results, traffic, and what it refuses."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from rank_pool import RankError
from runtime_cases import LENGTH, Case, prepare
from test_schedules import assert_equal_to_one_process

pytestmark = pytest.mark.ranks

OPTIONS = [{}, {"sp": True}, {"vocab_parallel": True}, {"sp": True, "vocab_parallel": True}]


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.soak), 4])  # two ranks: in test_schedules as well
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_feed_forward_and_loss_split_over_ranks_equal_one_process(rank_pools, tp, options):
    degrees = {"tp": tp, **options}
    assert_equal_to_one_process(rank_pools, Case("gpipe", 1, 2, degrees=degrees, dropout=0.0, dtype="float64"))


@pytest.mark.parametrize(("pipeline", "tp"), [(1, 2), (2, 2)])
def test_a_bias_that_a_head_and_its_parent_both_name_is_split_once(rank_pools, pipeline, tp):
    """BERT's: a whole copy under the other name would be a second parameter, without a gradient."""
    degrees = {"tp": tp, "vocab_parallel": True}
    case = Case("1f1b", pipeline, 4, degrees=degrees, dropout=0.0, dtype="float64", hugging_face="bert without dropout")
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_in_a_stage_of_its_own_takes_the_logits_as_their_head_has_split_them(rank_pools, tied):
    degrees = {"tp": 2, "vocab_parallel": True}
    case = Case(
        "interleaved", 2, 4, num_chunks=3, num_blocks=2, degrees=degrees, dropout=0.0, dtype="float64", tied=tied
    )
    assert prepare(case, 0).plan.stages[-1].num_layers == 1
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.parametrize(("sp", "recompute", "sums"), [(False, (), 8), (True, (), 8), (False, ("full",), 10)])
def test_a_layer_sends_eight_bsh_times_t_minus_one_over_t_and_two_more_when_it_is_recomputed(
    rank_pools, sp, recompute, sums
):
    """Recomputation stops at the last tensor that the backward needs, which stands before the second all-reduce."""
    pool = rank_pools(4)
    blocks, microbatches, microbatch, width, tp = 3, 2, 2, 16, 4
    case = Case(
        "gpipe", 1, microbatches, microbatch=microbatch, degrees={"tp": tp, "sp": sp}, dropout=0.0, recompute=recompute
    )
    bsh_bytes = microbatch * LENGTH * width * 4
    expected = blocks * microbatches * sums * (tp - 1) / tp * bsh_bytes
    # Where sequence shards begin and end, outside the layers: gradients gathered at the first, values at the last.
    ends = 2 * microbatches * (tp - 1) / tp * bsh_bytes if sp else 0.0
    for sent in pool.run("degree_cases.sent_in_a_step", prepare(case, pool.next_number())):
        group = {name: value for name, value in sent.items() if name.endswith("/tp")}
        partial = group.pop("all-reduce/tp", 0.0) if sp else 0.0  # gradients of norms, summed once an iteration
        assert sum(group.values()) == expected + ends
        assert partial <= 2 * (tp - 1) / tp * blocks * 5 * width * 4


@pytest.mark.soak  # the only pool of three ranks
def test_what_does_not_divide_is_refused_with_both_numbers(rank_pools):
    pool = rank_pools(3)
    case = Case("gpipe", 1, 2, degrees={"tp": 3}, dropout=0.0)
    with pytest.raises(RankError, match=r"has (48|16|36|32) in dimension \d, which 3 ranks do not divide"):
        pool.run("degree_cases.sent_in_a_step", prepare(case, pool.next_number()))
    heads = Case("gpipe", 1, 2, degrees={"tp": 3}, dropout=0.0, hugging_face="llama")
    with pytest.raises(RankError, match="the model has 4 num_attention_heads, which tp = 3 does not divide"):
        pool.run("degree_cases.sent_in_a_step", prepare(heads, pool.next_number()))
