"""Experts as a load histogram: capacity, traffic, placement, rules."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewright.planner.cost import expert_routing as moe
from stagewright.planner.errors import InvalidArgument


def counts(loads, devices):
    """Every device sends an equal share of each expert's tokens."""
    return np.array([[load / devices for load in loads] for _ in range(devices)])


def test_dispatch_and_combine_send_two_k_cf_bsh_and_top_one_half_of_top_two():
    elements = moe.exchange_elements(2048, 4096, top_k=2, degree=8, capacity_factor=1.25)
    assert elements == 2 * 2 * 1.25 * 2048 * 4096 * 7 / 8
    one = moe.exchange_elements(2048, 4096, top_k=1, degree=8, capacity_factor=1.25)
    assert one == elements / 2


def test_the_traffic_matrix_of_uniform_routing_is_the_formula():
    devices, tokens, hidden, k = 4, 64, 16, 2
    uniform = np.full((devices, 8), tokens * k / 8)
    matrix = moe.traffic_matrix(uniform, moe.home_placement(8, devices), token_bytes=hidden)
    sent = 2 * matrix.sum(axis=1)
    assert sent == pytest.approx(moe.exchange_elements(tokens, hidden, top_k=k, degree=devices))


def test_capacity_and_dropped_tokens():
    assert moe.capacity(1024, 8, top_k=2, capacity_factor=1.25) == 320
    assert moe.dropped_tokens([400, 300, 320, 0], 320) == 80
    assert moe.dropped_tokens([320] * 4, 320) == 0


def test_the_auxiliary_loss_is_alpha_when_uniform_and_more_when_not():
    uniform = [1 / 8] * 8
    assert moe.balance_loss(uniform, uniform) == pytest.approx(0.01)
    skewed = [0.5, *[0.5 / 7] * 7]
    assert moe.balance_loss(skewed, skewed) > 0.01


def test_dropless_layers_round_each_expert_up_to_blocks():
    loads = [1, 128, 129, 0]
    assert moe.padded_tokens(loads) == 128 + 128 + 256
    assert moe.dropped_tokens(loads, max(loads)) == 0
    # A capacity that drops nothing computes far more rows when routing is skewed.
    assert moe.capacity_rows(4, max(loads)) > sum(loads)


def test_a_hot_expert_is_shadowed_where_the_rule_says_and_the_layer_gets_faster():
    devices, experts = 8, 8
    loads = [8.0, *[1.0] * 7]
    sent = counts([load * 1000 for load in loads], devices)
    home = moe.home_placement(experts, devices)
    cheap = moe.shadowed(sent, home, token_bytes=100.0, expert_bytes=300_000.0)
    assert cheap[0] == tuple(range(devices))
    assert cheap[1:] == home[1:]
    dear = moe.shadowed(sent, home, token_bytes=100.0, expert_bytes=1e9)
    assert dear == home

    def seconds(placement):
        return moe.layer_s(sent, placement, token_bytes=100.0, token_s=1e-6, latency_s=1e-6, bytes_per_s=1e9)

    assert seconds(cheap) < seconds(home)
    assert moe.worth_shadowing(10.0, 9.0)
    assert not moe.worth_shadowing(9.0, 10.0)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=7), st.integers(2, 3))
def test_longest_first_is_within_four_thirds_of_the_optimum(loads, devices):
    found = moe.longest_first_placement(loads, devices)

    def busiest(owners):
        return max(sum(load for load, owner in zip(loads, owners, strict=True) if owner == d) for d in range(devices))

    best = min(busiest(owners) for owners in product(range(devices), repeat=len(loads)))
    assert busiest([holders[0] for holders in found]) <= best * 4 / 3 + 1e-9


def test_balanced_placement_lowers_the_busiest_device_with_equal_counts():
    loads = [9.0, 8.0, 1.0, 2.0, 7.0, 3.0, 2.0, 4.0]
    sent = counts(loads, 4)
    home, found = moe.home_placement(8, 4), moe.balanced_placement(loads, 4)
    assert sorted(d for holders in found for d in holders) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert moe.device_loads(sent, found).max() < moe.device_loads(sent, home).max()
    best = min(max(loads[order[2 * d]] + loads[order[2 * d + 1]] for d in range(4)) for order in permutations(range(8)))
    assert moe.device_loads(sent, found).max() <= best * 4 / 3


def test_expanding_hot_experts_brings_the_balance_under_the_threshold():
    loads = [16.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    placement, copies = moe.expanded_placement(loads, 4, slots=4, threshold=1.15)
    totals = np.zeros(4)
    for expert, holders in enumerate(placement):
        for device in holders:
            totals[device] += loads[expert] / len(holders)
    assert moe.imbalance(list(totals)) <= 1.15
    assert copies[0] > 1
    assert sum(copies) <= 16
    flat, once = moe.expanded_placement([1.0] * 8, 4, slots=4)
    assert once == [1] * 8
    assert len(flat) == 8
    with pytest.raises(InvalidArgument, match="cannot hold 8 experts"):
        moe.expanded_placement([1.0] * 8, 2, slots=3)


def test_partial_replication_copies_a_hot_expert_to_some_devices_only():
    loads = [12.0, *[2.0] * 7]
    sent = counts(loads, 8)
    home = moe.home_placement(8, 8)
    found = moe.partial_replication(sent, home, token_s=1.0, copy_s=0.3, most_copies=7)
    assert 1 < len(found[0]) < 8
    assert moe.device_loads(sent, found).max() < moe.device_loads(sent, home).max()
    assert moe.partial_replication(sent, home, token_s=1.0, copy_s=100.0, most_copies=7) == home


def test_janus_moves_experts_where_their_bytes_are_fewer():
    # E_remote 8 h^2 < 2 k bsh (e-1)/e
    hidden, k, e, remote = 1024, 2, 8, 7
    threshold = remote * 8 * hidden**2 / (2 * k * hidden * (e - 1) / e)
    assert moe.moves_experts(threshold * 1.01, hidden, top_k=k, degree=e, remote_experts=remote)
    assert not moe.moves_experts(threshold * 0.99, hidden, top_k=k, degree=e, remote_experts=remote)


def test_dispatch_in_proportion_to_bandwidth_shortens_the_exchange():
    inside, across = 300.0, 25.0
    node = np.arange(8) // 4
    bandwidths = np.where(node[:, None] == node[None, :], inside, across)
    np.fill_diagonal(bandwidths, inside)
    even = np.full((8, 8), 100.0)
    aware = moe.topology_aware_counts(800.0, bandwidths)
    assert aware.sum(axis=1) == pytest.approx(even.sum(axis=1))
    even_s = moe.exchange_s(even, latency_s=0.0, bytes_per_s=bandwidths)
    assert moe.exchange_s(aware, latency_s=0.0, bytes_per_s=bandwidths) < even_s


def test_experts_that_do_not_divide_are_refused_with_both_numbers():
    with pytest.raises(InvalidArgument, match="10 experts do not divide by 4 devices"):
        moe.home_placement(10, 4)
    with pytest.raises(InvalidArgument, match="10 experts do not divide by 4 devices"):
        moe.balanced_placement([1.0] * 10, 4)


def test_the_layout_of_shared_experts_follows_the_capacity():
    chosen = [
        moe.fastest_expert_layout(2048, 1024, 8 * 1024**2, top_k=2, capacity_factor=factor, degree=8, copies=4)
        for factor in (0.5, 1.0, 4.0, 16.0)
    ]
    assert chosen[0] == "tensor"
    assert chosen[-1] == "data"
    assert chosen == sorted(chosen, reverse=True), "once weights are cheaper they stay so"


def test_scattered_products_keep_no_padded_copies():
    loads = [100, 300, 50, 62]
    padded = moe.kept_rows(256, top_k=2, loads=loads, padded=True)
    assert padded == 256 + 2 * moe.padded_tokens(loads)
    assert moe.kept_rows(256, top_k=2) == 256
