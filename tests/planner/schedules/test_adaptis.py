"""AdaPtis: partition, placement and order together against each alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.schedules.adaptis import balanced_cuts, co_optimized, even_cuts, partitioned
from stagewright.planner.schedules.auto import AutoRequest, search
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate


def _hybrid(num_layers: int, num_ranks: int) -> StageCosts:
    """Every fourth layer has experts and takes 2.5 times as long; the last one holds the output layer."""
    forward_s = np.where(np.arange(num_layers) % 4 == 3, 2.5, 1.0)
    forward_s[-1] = 4.0
    share = np.full(num_layers, num_ranks / num_layers)
    return StageCosts.of(forward_s, 1.1 * forward_s, 0.8 * forward_s, activation=share)


@pytest.mark.parametrize(("num_ranks", "num_layers"), [pytest.param(4, 16, marks=pytest.mark.soak), (4, 25)])
def test_the_joint_loop_beats_every_schedule_on_the_even_partition(num_ranks, num_layers):
    layers = _hybrid(num_layers, num_ranks)
    common = {"latency_s": 0.1, "memory_cap": float(num_ranks), "evaluations": 20_000}
    answer = co_optimized(layers, num_ranks=num_ranks, num_microbatches=2 * num_ranks, **common)
    fixed = []
    for chunks in (1, 2, 4):
        costs = partitioned(layers, even_cuts(num_layers, chunks * num_ranks))
        fixed.append(search(AutoRequest(num_ranks, 2 * num_ranks, costs, chunk_counts=(chunks,), copies=1, **common)))
    assert answer.found.makespan_s < 0.98 * min(each.makespan_s for each in fixed)
    assert answer.found.makespan_s < 0.95 * min(each.gain.named_s for each in fixed if each.gain is not None)
    costs = partitioned(layers, answer.cuts)
    validate(answer.found.schedule)
    timeline = simulate(answer.found.schedule, costs, links=Links(latency_s=0.1))
    assert timeline.makespan_s == pytest.approx(answer.found.makespan_s)
    assert peak_activations(answer.found.schedule, costs).max() <= num_ranks * (1 + 1e-9)


def test_the_same_request_gives_the_same_answer():
    layers = _hybrid(12, 3)
    first, second = (
        co_optimized(layers, num_ranks=3, num_microbatches=4, chunk_counts=(1, 2), evaluations=2_000) for _ in range(2)
    )
    assert first.cuts == second.cuts
    pairs = zip(first.found.schedule.orders, second.found.schedule.orders, strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=4, max_size=9), st.integers(1, 4))
def test_the_interval_programme_equals_every_partition(work, stages):
    work_s = np.array(work, dtype=float)

    def longest(cuts) -> float:
        return max(work_s[low:high].sum() for low, high in itertools.pairwise(cuts))

    every = ((0, *inner, len(work)) for inner in itertools.combinations(range(1, len(work)), stages - 1))
    assert longest(balanced_cuts(work_s, stages)) == min(map(longest, every))


def test_too_few_layers_and_too_small_a_cap_name_both_numbers():
    with pytest.raises(InvalidArgument, match="3 layers cannot be cut into 4 stages"):
        co_optimized(StageCosts.uniform(3), num_ranks=4, num_microbatches=4)
    with pytest.raises(Infeasible, match=r"no partition of 8 layers over 2 ranks keeps the cap of 0.5"):
        co_optimized(StageCosts.uniform(8), num_ranks=2, num_microbatches=4, memory_cap=0.5)
