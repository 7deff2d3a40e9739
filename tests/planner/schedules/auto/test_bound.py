"""The bound is never above the best order, and meets it where the mathematics says so."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.schedules.auto.bound import any_order_bound, lower_bound
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import loop_placement, wave_placement

SMALL = [(2, 2, 1), (2, 3, 1), (3, 2, 1), (3, 3, 1), (4, 2, 1), (2, 1, 2), (3, 1, 2), (2, 1, 3), (2, 4, 1)]


@pytest.mark.parametrize("seed", range(36))
def test_bound_is_never_above_the_best_of_all_orders(seed, random_instance, brute_force):
    rng = np.random.default_rng(seed)
    ranks, microbatches, chunks = SMALL[seed % len(SMALL)]
    instance = random_instance(rng, ranks, microbatches, chunks, whole=seed % 2 == 0)
    best_s = brute_force(instance)
    assert np.isfinite(best_s)
    assert lower_bound(instance) <= best_s * (1 + 1e-9)


def test_bound_of_one_chunk_without_cap_is_met_by_zero_bubble_orders():
    # ZB-H2 of the published tables: 8 ranks, 16 microbatches, F/I/W/latency 10/12/8/1 ends at 557.
    costs = StageCosts.uniform(8, forward_s=10, input_grad_s=12, weight_grad_s=8)
    bound_s = any_order_bound(costs, loop_placement(8), num_ranks=8, num_microbatches=16, latency_s=1.0)
    assert bound_s == pytest.approx(557.0)


@pytest.mark.parametrize(("cap", "least"), [(2, 349.0), (3, 293.0)])
def test_bound_stays_below_known_optima_under_tight_caps(cap, least):
    costs = StageCosts.uniform(8, forward_s=10, input_grad_s=12, weight_grad_s=8, num_chunks=2)
    bound_s = any_order_bound(
        costs, wave_placement(4, 2), num_ranks=4, num_microbatches=8, latency_s=1.0, memory_cap=cap
    )
    assert 0.9 * least < bound_s <= least
