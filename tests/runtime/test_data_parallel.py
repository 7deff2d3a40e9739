"""Data-parallel reduction: buckets from the back, overlapped with the last backward, by the library or our own ring."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, prepare
from test_schedules import assert_equal_to_one_process

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("bucket_bytes", [1000, 4096, 25 * 2**20])
def test_gradients_are_reduced_in_psi_over_the_bucket_size_rounded_up_buckets(rank_pools, bucket_bytes):
    pool = rank_pools(2)
    case = Case("gpipe", 1, 2, degrees={"dp": 2}, dropout=0.0, parameters={"bucket_bytes": bucket_bytes})
    for counts in pool.run("degree_cases.buckets_of_an_iteration", prepare(case, pool.next_number())):
        assert counts.num_buckets == math.ceil(counts.gradient_bytes / bucket_bytes)
        # Only the bucket of the first parameter has nothing left to hide under (its table is 2,304 bytes).
        assert counts.num_overlapped >= counts.num_buckets - math.ceil(2304 / bucket_bytes) - 1
        assert counts.num_overlapped < counts.num_buckets


@pytest.mark.parametrize("algorithm", ["library", "ring"])
def test_bucketed_overlapped_reduction_equals_one_process(rank_pools, algorithm):
    parameters = {"bucket_bytes": 1000, "all_reduce": algorithm}
    assert_equal_to_one_process(rank_pools, Case("gpipe", 1, 3, degrees={"dp": 4}, parameters=parameters))
    assert_equal_to_one_process(
        rank_pools, Case("zb-h1", 2, 3, degrees={"dp": 2}, parameters=parameters, dtype="float64", tied=False)
    )
    assert_equal_to_one_process(
        rank_pools, Case("interleaved", 2, 4, num_chunks=2, degrees={"dp": 2}, parameters=parameters)
    )


@pytest.mark.parametrize("length", [4 * 256, 4 * 1000])
def test_the_ring_sends_two_times_n_minus_one_over_n_of_the_tensor(rank_pools, length):
    for sent, error in rank_pools(4).run("degree_cases.ring", length):
        assert sent == 2 * 3 / 4 * length * 8  # 1 GiB would be 1.5 GiB
        assert error == 0.0


@pytest.mark.parametrize("length", [1, 3, 1001])
def test_the_ring_sums_what_it_cannot_cut_evenly(rank_pools, length):
    results = rank_pools(4).run("degree_cases.ring", length)
    assert sum(sent for sent, _ in results) == 2 * 3 * length * 8
    assert max(error for _, error in results) == 0.0
