"""States by ZeRO stage: the oracle O17 and what follows from it."""

import numpy as np
import pytest

from stagewright.planner.catalog.clusters import resolve_cluster
from stagewright.planner.cost.communication import sent_bytes
from stagewright.planner.cost.data_parallel import (
    bucketed_exposed_s,
    compressed_sharded_traffic,
    fsdp_peak_parameter_bytes,
    num_buckets,
    plain_sharded_traffic,
    replica_traffic,
    split_group,
)
from stagewright.planner.cost.groups import GroupShape, strided_group
from stagewright.planner.cost.memory import device_state_bytes
from stagewright.planner.documents import Degrees, Optimizer

PSI = 7.5e9
ADAM = Optimizer.standard("adam", "bf16")
GB = 1e9


def states(zero, dp=64, **more):
    return device_state_bytes(PSI, 0.0, Degrees(dp=dp, zero=zero), ADAM, **more)


@pytest.mark.parametrize(("zero", "expected_gb"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_states_of_seven_and_a_half_billion_parameters_on_64_devices(zero, expected_gb):
    assert states(zero).total / GB == pytest.approx(expected_gb, abs=0.05)


def test_zero_states_are_the_formulas_of_the_paper():
    n = 64
    assert states(1).total == pytest.approx(4 * PSI + 12 * PSI / n)
    assert states(2).total == pytest.approx(2 * PSI + 14 * PSI / n)
    assert states(3).total == pytest.approx(16 * PSI / n)


def test_master_weights_are_told_apart_from_the_moments():
    found = states(0)
    assert found.master_weights == 4 * PSI
    assert found.optimizer == 8 * PSI
    assert found.items().optimizer == 12 * PSI
    full = device_state_bytes(PSI, 0.0, Degrees(), Optimizer.standard("adam", "fp32"))
    assert full.master_weights == 0.0
    assert full.total == 16 * PSI


def test_traffic_of_stages_one_to_three_is_two_two_and_three_psi():
    group = strided_group(64, 1, resolve_cluster("a100-sxm-80g:8x8").groups[0])
    share = 63 / 64
    sizes = (2 * PSI, 2 * PSI)
    assert replica_traffic(*sizes, group, zero=0).iteration_bytes / 2 == pytest.approx(2 * PSI * share)
    assert replica_traffic(*sizes, group, zero=1).iteration_bytes / 2 == pytest.approx(2 * PSI * share)
    assert replica_traffic(*sizes, group, zero=2).iteration_bytes / 2 == pytest.approx(2 * PSI * share)
    third = replica_traffic(*sizes, group, zero=3)
    assert (third.iteration_bytes + third.microbatch_bytes) / 2 == pytest.approx(3 * PSI * share)


def test_stages_two_and_three_pay_for_each_microbatch_unless_gradients_accumulate():
    group = strided_group(8, 1, resolve_cluster("a100-sxm-80g:8x1").groups[0])
    eager = replica_traffic(2e9, 2e9, group, zero=2, accumulate=False)
    lazy = replica_traffic(2e9, 2e9, group, zero=2)
    assert eager.microbatch_bytes == sent_bytes("reduce-scatter", 2e9, 8)
    assert lazy.microbatch_bytes == 0.0
    each = replica_traffic(2e9, 2e9, group, zero=3, accumulate=False)
    assert each.microbatch_bytes == 3 * sent_bytes("all-gather", 2e9, 8)
    once = replica_traffic(2e9, 2e9, group, zero=3, gather_once=True)
    assert once.microbatch_bytes == 0.0
    assert once.iteration_bytes == 3 * sent_bytes("all-gather", 2e9, 8)


def test_weight_update_sharding_moves_as_much_as_an_all_reduce_and_divides_the_state():
    group = strided_group(32, 1, resolve_cluster("a100-sxm-80g:8x4").groups[0])
    assert replica_traffic(2e9, 2e9, group, zero=1).iteration_bytes == pytest.approx(
        replica_traffic(2e9, 2e9, group, zero=0).iteration_bytes
    )
    assert states(1).optimizer == pytest.approx(states(0).optimizer / 64)


def test_sharded_adam_gives_the_weights_of_replicated_adam():
    rng = np.random.default_rng(0)
    weights, gradients = rng.normal(size=24), rng.normal(size=(5, 24))

    def adam(part, slices):
        w, m, v = part.copy(), np.zeros_like(part), np.zeros_like(part)
        for step, gradient in enumerate(gradients, start=1):
            g = gradient[slices]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            w = w - 1e-2 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        return w

    whole = adam(weights, slice(None))
    sharded = np.concatenate([adam(weights[i : i + 6], slice(i, i + 6)) for i in range(0, 24, 6)])
    assert np.array_equal(whole, sharded)


def test_mics_shards_inside_groups_of_eight_and_reduces_across_them_once():
    cluster = resolve_cluster("a100-sxm-80g:8x8").groups[0]
    group = strided_group(64, 1, cluster)
    assert states(3, shard_size=8).total == pytest.approx(16 * PSI / 8)
    inner, outer = split_group(group, 8)
    assert (inner.size, outer.size) == (8, 8)
    assert inner.outermost() == cluster.links[0], "weights are gathered inside the node"
    traffic = replica_traffic(2 * PSI, 2 * PSI, group, zero=3, shard_size=8, accumulate=False)
    inside_only = replica_traffic(2 * PSI, 2 * PSI, inner, zero=3, accumulate=False)
    assert traffic.microbatch_bytes == inside_only.microbatch_bytes
    assert traffic.iteration_bytes == pytest.approx(2 * 7 / 8 * 2 * PSI / 8), "gradient shards, once an iteration"


def test_hybrid_sharding_all_reduces_a_shard_between_groups():
    group = strided_group(64, 1, resolve_cluster("a100-sxm-80g:8x8").groups[0])
    for shard in (2, 4, 8, 16, 32):
        _, outer = split_group(group, shard)
        traffic = replica_traffic(2e9, 2e9, group, zero=1, shard_size=shard)
        expected = sent_bytes("reduce-scatter", 2e9, shard) + sent_bytes("all-gather", 2e9, shard)
        assert traffic.iteration_bytes == pytest.approx(expected + sent_bytes("all-reduce", 2e9 / shard, outer.size))


def test_fsdp_holds_its_shard_and_two_units_at_most():
    units = [2.0, 5.0, 3.0]
    assert fsdp_peak_parameter_bytes(units, 5) == 10.0 / 5 + 8.0
    assert fsdp_peak_parameter_bytes(units, 5, in_flight=1) == 10.0 / 5 + 5.0


def test_a_gradient_bucket_of_25_mib_gives_the_number_of_buckets():
    assert num_buckets(PSI * 4, 25 * 2**20) == -(-int(PSI * 4) // (25 * 2**20))
    assert num_buckets(1.0, 25 * 2**20) == 1


def test_bucketed_reduction_leaves_the_last_bucket_and_what_does_not_fit():
    group = strided_group(8, 1, resolve_cluster("a100-sxm-80g:8x1").groups[0])
    size, bucket = 250 * 2.0**20, 25 * 2.0**20
    alone = bucketed_exposed_s(size, group, bucket_bytes=bucket, backward_s=0.0)
    hidden = bucketed_exposed_s(size, group, bucket_bytes=bucket, backward_s=10.0)
    assert hidden == pytest.approx(alone / 10, rel=1e-6), "one of ten buckets"
    half = bucketed_exposed_s(size, group, bucket_bytes=bucket, backward_s=alone / 2)
    assert hidden < half < alone
    assert bucketed_exposed_s(size, GroupShape(()), bucket_bytes=bucket, backward_s=1.0) == 0.0


def test_larger_fusion_buffers_pay_latency_less_often():
    group = strided_group(8, 1, resolve_cluster("a100-sxm-80g:8x1").groups[0])
    times = [bucketed_exposed_s(1e9, group, bucket_bytes=size, backward_s=0.0) for size in (1e6, 1e7, 1e8, 1e9)]
    assert times == sorted(times, reverse=True)


def test_zero_plus_plus_sends_three_quarters_psi_between_nodes_where_zero_three_sends_three():
    assert compressed_sharded_traffic(PSI).between == 0.75 * PSI
    plain = plain_sharded_traffic(PSI, 64, 8)
    assert plain.between == pytest.approx(3 * PSI * 63 / 64)
    assert plain_sharded_traffic(PSI, 8, 8).between == 0.0
