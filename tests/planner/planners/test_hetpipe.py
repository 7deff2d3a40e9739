"""HetPipe: partitions over mixed GPUs equal brute force; waves cost and miss what the paper says."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest

from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.planners.hetpipe import (
    ChainCosts,
    MixedGpu,
    allocate,
    missing_updates,
    most_missing,
    partition,
    plan_worker,
    samples_per_s,
    wave_ends,
)

FAST, SLOW = MixedGpu("fast", 2.0, 20.0), MixedGpu("slow", 1.0, 12.0)


def _costs(seed: int, layers: int) -> ChainCosts:
    draw = np.random.default_rng(seed)
    return ChainCosts(
        draw.uniform(0.5, 2.0, layers),
        draw.uniform(0.5, 2.0, layers),
        draw.uniform(0.2, 1.0, layers),
        draw.uniform(0.0, 0.4, layers - 1),
    )


def _brute_force(costs: ChainCosts, gpus: list[MixedGpu], in_flight: int) -> float:
    best, layers, count = float("inf"), len(costs.time_s), len(gpus)
    for order in permutations(gpus):
        for cuts in combinations(range(1, layers), count - 1):
            times = []
            for k, ((a, b), gpu) in enumerate(zip(pairwise((0, *cuts, layers)), order, strict=True)):
                held = costs.state_bytes[a:b].sum() + min(in_flight, count - k) * costs.kept_bytes[a:b].sum()
                hop = costs.hop_s[a - 1] if a else 0.0
                times.append(costs.time_s[a:b].sum() / gpu.speed + hop if held <= gpu.memory_bytes else float("inf"))
            best = min(best, max(max(times), sum(times) / in_flight))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_bottleneck_over_mixed_gpus_is_that_of_every_order_and_cut(seed: int) -> None:
    draw = np.random.default_rng(100 + seed)
    layers, count = int(draw.integers(4, 9)), int(draw.integers(2, 5))
    gpus = [MixedGpu(str(i % 2), float(1 + i % 2), float(draw.uniform(5, 14))) for i in range(count)]
    costs = _costs(seed, layers)
    found = partition(costs, gpus, count)
    best = _brute_force(costs, gpus, count)
    assert (found is None) == (best == float("inf"))
    if found is not None:
        # The partition is the one of least bottleneck; with the pipe full that is the time of a minibatch.
        assert found.minibatch_s == pytest.approx(best, rel=1e-9)


def test_faster_gpus_hold_more_layers_and_stages_of_less_memory_fewer() -> None:
    costs = ChainCosts(np.ones(12), np.ones(12), np.full(12, 0.1), np.zeros(11))
    found = plan_worker(costs, [FAST, SLOW])
    layers = {gpu.kind: b - a for gpu, (a, b) in zip(found.gpus, pairwise(found.bounds), strict=True)}
    assert layers == {"fast": 8, "slow": 4}
    assert found.in_flight == 2
    assert found.minibatch_s == pytest.approx(4.0)
    small = MixedGpu("slow", 1.0, 2.5)
    assert [b - a for a, b in pairwise(plan_worker(costs, [FAST, small]).bounds)].count(2) == 1


def test_a_wave_pays_for_synchronisation_once_so_more_minibatches_in_flight_hide_it() -> None:
    costs = ChainCosts(np.ones(4), np.ones(4), np.ones(4), np.zeros(3))
    gpus = [MixedGpu("a", 1.0, 1e9)] * 4
    single, full = partition(costs, gpus, 1), partition(costs, gpus, 4)
    assert single is not None and full is not None
    assert (single.minibatch_s, full.minibatch_s) == (4.0, 1.0)
    assert samples_per_s([full] * 2, 32, [2.0, 2.0]) == pytest.approx(2 * 4 * 32 / (4.0 + 2.0))
    assert samples_per_s([single] * 2, 32, [2.0, 2.0]) == pytest.approx(2 * 32 / (4.0 + 2.0))


@pytest.mark.parametrize("in_flight", [1, 2, 4, 7])
@pytest.mark.parametrize("distance", [0, 1, 3])
def test_no_minibatch_misses_more_than_s_global_updates_and_some_miss_that_many(in_flight: int, distance: int) -> None:
    counted = [missing_updates(p, in_flight, distance) for p in range(in_flight * (distance + 8))]
    assert max(counted) == most_missing(in_flight, distance)


def test_distance_zero_is_a_barrier_a_wave_and_a_larger_one_lets_the_fast_run_ahead_only_at_first() -> None:
    barrier = wave_ends([1.0, 3.0], 6, 0)
    assert barrier[:, 0].tolist() == [1.0, 4.0, 7.0, 10.0, 13.0, 16.0]
    loose = wave_ends([1.0, 3.0], 40, 4)
    assert loose[4, 0] == 5.0
    assert np.diff(loose[20:, 0]) == pytest.approx(np.full(19, 3.0))


def test_allocations_follow_the_papers_three_policies() -> None:
    nodes = [[FAST] * 4, [SLOW] * 4]
    assert allocate(nodes, "node") == ((FAST,) * 4, (SLOW,) * 4)
    assert allocate(nodes, "equal") == ((FAST, SLOW),) * 4
    assert allocate(nodes, "hybrid") == ((FAST, FAST, SLOW, SLOW),) * 2
    with pytest.raises(InvalidArgument, match="equal nodes"):
        allocate([[FAST], [SLOW, SLOW]], "equal")


def test_what_fits_nowhere_is_said_with_both_numbers() -> None:
    with pytest.raises(Infeasible, match="fit no partition over 2 GPUs of 32 bytes"):
        plan_worker(ChainCosts(np.ones(4), np.full(4, 30.0), np.ones(4), np.zeros(3)), [FAST, SLOW])
