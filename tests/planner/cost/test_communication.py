"""Collective times over rank groups: closed forms, crossovers, measured lines."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewright.planner.catalog.clusters import resolve_cluster
from stagewright.planner.cost import communication as comm
from stagewright.planner.cost.groups import GroupShape, Tier, group_of_ranks, link_between, strided_group
from stagewright.planner.documents.cluster import LinkLevel, LinkSegment

GIB = 2.0**30


def level(num_devices=8, latency_s=1e-6, bytes_per_s=100e9, **more):
    return LinkLevel(name="link", num_devices=num_devices, latency_s=latency_s, bytes_per_s=bytes_per_s, **more)


def flat(n, **more):
    return GroupShape((Tier(n, level(n, **more)),))


def two_tiers(inner=8, outer=4):
    return GroupShape((Tier(inner, level(inner)), Tier(outer, level(inner * outer, 5e-6, 10e9))))


def test_ring_all_reduce_of_one_gibibyte_on_four_sends_one_and_a_half():
    assert comm.sent_bytes("all-reduce", GIB, 4) == 1.5 * GIB
    seconds = comm.collective_s("all-reduce", GIB, flat(4), "ring")
    assert seconds == pytest.approx(2 * 3 * 1e-6 + 1.5 * GIB / 100e9, rel=1e-12)


def test_all_gather_and_reduce_scatter_are_half_a_ring_all_reduce():
    for n in (2, 3, 8):
        half = comm.collective_s("all-gather", GIB, flat(n), "ring")
        assert half == comm.collective_s("reduce-scatter", GIB, flat(n), "ring")
        assert 2 * half == pytest.approx(comm.collective_s("all-reduce", GIB, flat(n), "ring"))


def test_a_tree_wins_for_small_messages_and_a_ring_for_large_ones():
    group = flat(64)
    small, large = 1e3, 1e9
    assert comm.tree_all_reduce_s(small, group) < comm.ring_all_reduce_s(small, group)
    assert comm.ring_all_reduce_s(large, group) < comm.tree_all_reduce_s(large, group)
    for size in (small, large):
        best = comm.collective_s("all-reduce", size, group)
        assert best == min(comm.collective_s("all-reduce", size, group, name) for name in ("ring", "tree", "two-level"))


def test_two_level_all_reduce_sends_only_a_shard_between_nodes():
    group = two_tiers(8, 4)
    inside = 2 * (7 * 1e-6 + 7 / 8 * GIB / 100e9)
    between = 2 * 3 * 5e-6 + 2 * 3 / 4 * (GIB / 8) / 10e9
    assert comm.two_level_all_reduce_s(GIB, group) == pytest.approx(inside + between)


def test_a_group_with_one_member_a_node_has_one_network_card_and_one_with_eight_has_eight():
    cluster = resolve_cluster("a100-sxm-80g:8x4").groups[0]
    across = strided_group(4, 8, cluster)
    whole = strided_group(32, 1, cluster)
    assert [tier.fan_out for tier in across.tiers] == [4]
    assert [tier.fan_out for tier in whole.tiers] == [8, 4]
    network = cluster.links[1]
    assert across.ring_bytes_per_s == network.bytes_per_s * network.achieved_share
    assert whole.ring_bytes_per_s == 8 * across.ring_bytes_per_s


def test_hierarchical_all_to_all_beats_the_flat_one_for_small_messages_only():
    group = two_tiers(8, 16)
    assert comm.two_level_all_to_all_s(1e4, group) < comm.flat_all_to_all_s(1e4, group)
    assert comm.flat_all_to_all_s(1e9, group) < comm.two_level_all_to_all_s(1e9, group)


def test_flat_all_to_all_sends_n_minus_one_over_n():
    assert comm.flat_all_to_all_s(GIB, flat(8)) == pytest.approx(7e-6 + 7 / 8 * GIB / 100e9)
    assert comm.sent_bytes("all-to-all", GIB, 8) == 7 / 8 * GIB


def test_switches_that_reduce_send_each_tensor_once():
    group = flat(8, reduces_in_network=True)
    assert comm.two_level_all_reduce_s(GIB, group) == pytest.approx(2e-6 + GIB / 100e9)


def test_a_parameter_server_is_its_own_bottleneck():
    link = level(latency_s=0.0)
    one = comm.parameter_server_s(GIB, num_workers=8, num_servers=1, worker=link)
    assert one == pytest.approx(8 * 2 * GIB / 100e9)
    as_many = comm.parameter_server_s(GIB, num_workers=8, num_servers=8, worker=link)
    assert as_many == pytest.approx(2 * GIB / 100e9)


def test_quantised_gradients_shrink_with_their_bits():
    assert comm.compressed_bytes(32.0, bits=1) == 1.0
    assert comm.compressed_bytes(32.0, bits=32) == 32.0


def test_a_group_of_one_costs_nothing():
    for operation in ("all-reduce", "all-gather", "all-to-all", "broadcast", "send-receive"):
        assert comm.collective_s(operation, GIB, GroupShape(())) == 0.0


def test_an_unknown_algorithm_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="no algorithm 'tree'; known: ring, two-level"):
        comm.collective_s("all-gather", GIB, flat(4), "tree")


def test_a_measured_line_replaces_the_model_and_scales_to_smaller_groups():
    line = (LinkSegment(from_bytes=0, latency_s=10e-6, bytes_per_s=50e9),)
    measured = level(8, collectives={"all-reduce": line})
    assert comm.collective_s("all-reduce", 1e9, GroupShape((Tier(8, measured),))) == pytest.approx(10e-6 + 1e9 / 50e9)
    four = comm.collective_s("all-reduce", 1e9, GroupShape((Tier(4, measured),)))
    assert four == pytest.approx(10e-6 * 3 / 7 + 1e9 / 50e9 * (3 / 4) / (7 / 8))


@pytest.mark.parametrize(
    "operation", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "send-receive"]
)
def test_several_sizes_at_once_take_what_each_takes_alone(operation):
    lines = tuple(
        LinkSegment(from_bytes=at, latency_s=1e-5 / rate, bytes_per_s=rate * 1e9) for at, rate in ((0, 1), (1e7, 9))
    )
    measured = GroupShape((Tier(4, level(8, collectives={operation: lines})),))
    sizes = np.array([1e3, 1e6, 1e7, 1e10])
    for group in (flat(8), two_tiers(), measured, GroupShape(())):
        alone = [comm.collective_s(operation, size, group) for size in sizes.tolist()]
        np.testing.assert_allclose(comm.collective_s(operation, sizes, group) + np.zeros(4), alone, rtol=1e-14)


def test_a_message_takes_the_segment_of_its_size():
    segments = (
        LinkSegment(from_bytes=0, latency_s=1e-5, bytes_per_s=1e9),
        LinkSegment(from_bytes=1e6, latency_s=2e-5, bytes_per_s=9e9),
    )
    link = level(2, segments=segments)
    assert comm.message_s(1e3, link) == pytest.approx(1e-5 + 1e-6)
    assert comm.message_s(9e9, link) == pytest.approx(2e-5 + 1.0)
    assert comm.message_s(1e3, None) == 0.0


@given(st.integers(1, 6), st.integers(1, 6), st.floats(1e3, 1e9))
def test_no_algorithm_beats_the_bandwidth_bound(inner, outer, size):
    group = GroupShape(
        tuple(
            Tier(fan, level(fan, latency, bandwidth))
            for fan, latency, bandwidth in ((inner, 1e-6, 100e9), (outer, 5e-6, 10e9))
            if fan > 1
        )
    )
    n = group.size
    if n == 1:
        return
    bound = (
        2
        * (n - 1)
        / n
        * size
        / max(tier.bytes_per_s for tier in group.tiers)
        / math.prod(tier.fan_out for tier in group.tiers)
    )
    assert comm.collective_s("all-reduce", size, group) > bound
    assert comm.collective_s("all-reduce", size, group) >= comm.collective_s("reduce-scatter", size, group)


@given(st.lists(st.integers(0, 63), min_size=1, max_size=12, unique=True))
def test_the_shape_of_any_set_of_ranks_has_at_least_as_many_members(ranks):
    group = resolve_cluster("h100-sxm:8x8").groups[0]
    shape = group_of_ranks(ranks, group)
    assert shape.size >= len(ranks)
    assert (shape.outermost() is not None) == (len(ranks) > 1)


def test_link_between_devices_of_different_groups_is_the_one_that_joins_them():
    cluster = resolve_cluster("a100-sxm-80g:8x1+v100-sxm-32g:8x1")
    assert link_between(0, 7, cluster) == cluster.groups[0].links[0]
    assert link_between(3, 9, cluster) == cluster.between_groups
    assert link_between(9, 15, cluster) == cluster.groups[1].links[0]
    assert link_between(4, 4, cluster) is None
    with pytest.raises(IndexError):
        link_between(99, 100, cluster)
