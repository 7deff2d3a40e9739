"""Sequence and context parallelism: traffic, balance, crossovers."""

import pytest

from stagewright.planner.catalog import resolve_cluster
from stagewright.planner.cost import context_layouts as ctx
from stagewright.planner.cost.context_layouts import AttentionSizes, TokenOrder
from stagewright.planner.cost.groups import GroupShape, Tier, strided_group
from stagewright.planner.documents.cluster import LinkLevel
from stagewright.planner.errors import InvalidArgument

SIZES = AttentionSizes(batch=1, sequence=32768, hidden=4096, heads=32)
BSH = SIZES.elements


@pytest.mark.parametrize("degree", [2, 4, 8, 16])
def test_traffic_formulas(degree):
    p = degree
    assert ctx.tensor_sequence_traffic(SIZES, p).total == pytest.approx(8 * (p - 1) / p * BSH)
    assert ctx.ulysses_traffic(SIZES, p).total == pytest.approx(8 * (p - 1) / p**2 * BSH)
    assert ctx.ring_traffic(SIZES, p).forward == pytest.approx(2 * (p - 1) / p * BSH)
    assert ctx.ring_traffic(SIZES, p).backward == pytest.approx(4 * (p - 1) / p * BSH)
    assert ctx.ring_self_attention_traffic(SIZES, p).total == pytest.approx(8 * (p - 1) / p * BSH)
    burst = ctx.burst_traffic(SIZES, p)
    assert burst.forward == ctx.ring_traffic(SIZES, p).forward
    assert burst.backward == pytest.approx((3 * BSH + 2 * 32768 * 32) * (p - 1) / p)


def test_ulysses_sends_an_eighth_of_tensor_parallelism_on_eight_devices():
    ratio = ctx.ulysses_traffic(SIZES, 8).total / ctx.tensor_sequence_traffic(SIZES, 8).total
    assert ratio == pytest.approx(1 / 8)


def test_bursts_backward_sends_three_quarters_and_a_little():
    ratio = ctx.burst_traffic(SIZES, 8).backward / ctx.ring_traffic(SIZES, 8).backward
    assert ratio == pytest.approx(0.75 + 2 * 32 / (4 * 4096))


def test_usp_is_ulysses_at_one_end_and_the_ring_at_the_other():
    for p in (2, 4, 8):
        assert ctx.usp_traffic(SIZES, p, 1).total == pytest.approx(ctx.ulysses_traffic(SIZES, p).total)
        assert ctx.usp_traffic(SIZES, 1, p).total == pytest.approx(ctx.ring_traffic(SIZES, p).total)
    u, r = 4, 2
    found = ctx.usp_traffic(SIZES, u, r)
    assert found.forward == pytest.approx(4 * BSH / 8 * 3 / 4 + 2 * BSH * (r - 1) / 8)


def test_grouped_heads_shrink_the_ring_and_the_gathered_variant():
    grouped = AttentionSizes(1, 32768, 4096, 32, kv_share=0.25)
    assert ctx.ring_traffic(grouped, 8).total == pytest.approx(ctx.ring_traffic(SIZES, 8).total / 4)
    assert ctx.gathered_traffic(grouped, 8).forward == pytest.approx(2 * BSH * 7 / 8 * 0.25)


def test_dynamic_sequence_parallelism_sends_a_quarter_of_ulysses_on_a_space_time_block():
    two_attentions = 2 * ctx.ulysses_traffic(SIZES, 8).total
    assert ctx.switch_traffic(SIZES, 8).total / two_attentions <= 0.25 + 1e-12


def test_wallfacer_with_teams_of_one_is_the_ring_and_larger_teams_shorten_it():
    assert ctx.wallfacer_traffic(SIZES, 16, 1).total == pytest.approx(ctx.ring_traffic(SIZES, 16).total)
    many = 4096
    ring_part = ctx.wallfacer_traffic(SIZES, many, 2).forward - 4 * BSH / many
    assert ring_part == pytest.approx(2 * BSH / 2, rel=2e-3)
    with pytest.raises(InvalidArgument, match="teams of 3"):
        ctx.wallfacer_traffic(SIZES, 16, 3)


def test_the_best_team_depends_on_latency():
    fast = resolve_cluster("h100-sxm:8x8").groups[0]
    tiny = AttentionSizes(1, 64, 64, 4)
    assert ctx.best_team(tiny, 64, fast)[0] > 1, "small blocks: fewer hops"
    # The chosen team is the fastest of all that are possible.
    team, seconds = ctx.best_team(SIZES, 64, fast)
    assert 64 % team**2 == 0
    assert seconds > 0


@pytest.mark.parametrize(("degree", "expected"), [(4, 1.6), (8, 16 / 9), (2, 4 / 3)])
def test_contiguous_causal_parts_leave_the_last_device_with_the_most(degree, expected):
    assert ctx.causal_imbalance(degree, TokenOrder.CONTIGUOUS) == pytest.approx(expected)
    assert expected == pytest.approx(2 * degree / (degree + 1))


@pytest.mark.parametrize("order", [TokenOrder.STRIPED, TokenOrder.ZIG_ZAG])
def test_striped_and_zig_zag_parts_are_balanced(order):
    for degree in (2, 4, 8):
        assert ctx.causal_imbalance(degree, order) == 1.0


def test_helpers_bring_the_idle_share_from_three_eighths_to_one_eighth():
    assert ctx.causal_idle_fraction(4, balanced=False) == pytest.approx(0.375)
    assert ctx.causal_idle_fraction(4, balanced=True) == pytest.approx(0.125)
    for degree in (3, 5, 7):
        assert ctx.causal_idle_fraction(degree, balanced=True) == 0.0
    for degree in (2, 6, 8):
        assert ctx.causal_idle_fraction(degree, balanced=True) == pytest.approx(1 / (2 * degree))
        assert ctx.causal_idle_fraction(degree, balanced=False) == pytest.approx((degree - 1) / (2 * degree))


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 7, 8])
def test_the_helped_schedule_computes_every_causal_pair_once(degree):
    pairs = [pair for row in ctx.helper_schedule(degree) for pair in row if pair is not None]
    assert sorted(pairs) == sorted((q, k) for q in range(degree) for k in range(q + 1))


def ring_link(bytes_per_s):
    return GroupShape((Tier(4, LinkLevel(name="ring", num_devices=4, latency_s=0.0, bytes_per_s=bytes_per_s)),))


def test_a_ring_hides_its_transfers_above_a_block_length():
    flops_per_s, bytes_per_s, features = 300e12, 50e9, 128
    threshold = ctx.least_block_tokens(flops_per_s, bytes_per_s)
    assert threshold == pytest.approx(flops_per_s / bytes_per_s)
    for tokens, hidden in ((threshold * 1.01, True), (threshold * 0.5, False)):
        block_s = 4 * tokens**2 * features / flops_per_s
        block_bytes = 2 * tokens * features * 2
        total = ctx.ring_attention_s(block_s, block_bytes, ring_link(bytes_per_s))
        assert (total == pytest.approx(4 * block_s)) == hidden


def test_a_lock_step_ring_waits_for_the_slowest_device():
    uneven = ctx.causal_blocks(4, TokenOrder.CONTIGUOUS)
    assert ctx.ring_attention_s(1.0, 0.0, ring_link(1e9), work=uneven) == 4.0
    assert ctx.ring_attention_s(1.0, 0.0, ring_link(1e9)) == 4.0
    assert ctx.ring_attention_s(1.0, 0.0, GroupShape(())) == 1.0


def test_a_double_ring_leaves_the_node_r_over_w_times():
    assert ctx.outer_hops(16, 8) == 1
    assert ctx.outer_hops(16, 1) == 15
    cluster = resolve_cluster("a100-sxm-80g:8x2").groups[0]
    inner, outer, single = strided_group(8, 1, cluster), strided_group(2, 8, cluster), strided_group(16, 1, cluster)
    block = 64e6
    one_ring = 15 * ctx.neighbour_s(block, single)
    assert ctx.double_ring_s(block, inner, outer) < one_ring
    with pytest.raises(InvalidArgument, match="window of 3"):
        ctx.outer_hops(16, 3)


def test_heads_are_exchanged_inside_the_node_and_the_ring_runs_across():
    cluster = resolve_cluster("h100-sxm:8x4").groups[0]
    long = AttentionSizes(1, 65536, 4096, 32)
    attention_s = 3.5 * 2 * 65536**2 * 4096 / 32 / 450e12
    best = ctx.best_context_split(long, 32, cluster, attention_s=attention_s)
    assert (best.ulysses, best.ring, best.head_first) == (8, 4, True)
    for u in (1, 2, 4, 16, 32):
        assert ctx.context_split_s(long, u, 32 // u, cluster, attention_s=attention_s) > best.seconds


def test_the_placement_flips_when_the_bandwidths_do():
    def group(inside, between):
        base = resolve_cluster("h100-sxm:8x4").groups[0]
        links = tuple(
            level.model_copy(update={"bytes_per_s": speed, "latency_s": 1e-6, "achieved_share": 1.0})
            for level, speed in zip(base.links, (inside, between), strict=True)
        )
        return base.model_copy(update={"links": links})

    def head_first_wins(between):
        first, second = (
            ctx.context_split_s(SIZES, 8, 4, group(400e9, between), head_first=choice, attention_s=2e-3)
            for choice in (True, False)
        )
        return first < second

    # A slow network cannot hide the ring, so the ring stays inside the node; a fast one hides it.
    assert not head_first_wins(20e9)
    assert head_first_wins(100e9)


def test_key_value_heads_limit_the_exchange_of_heads():
    cluster = resolve_cluster("h100-sxm:8x4").groups[0]
    assert ctx.best_context_split(SIZES, 32, cluster, kv_heads=2).ulysses <= 2


def test_ring_self_attention_keeps_its_scores():
    assert ctx.score_bytes(SIZES, 4) == 5 * 32 * 32768**2 / 4
