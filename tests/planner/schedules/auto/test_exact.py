"""Three exact methods agree: all orders one by one, branch and bound, the integer programme."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.schedules.auto.branching import improve_exactly, raise_bound
from stagewright.planner.schedules.auto.climbing import climb_targets
from stagewright.planner.schedules.auto.milp import solve_milp
from stagewright.planner.schedules.auto.sweep import end_times
from stagewright.planner.schedules.auto.word import fits

SMALL = [(2, 2, 1), (2, 3, 1), (3, 2, 1), (3, 3, 1), (4, 2, 1), (2, 1, 2), (3, 1, 2), (2, 1, 3), (2, 4, 1)]


def assert_best_of_all(instance, brute_force):
    """Hold the exact search against all orders; return the makespan that it started from and its verdict."""
    start_s, words = climb_targets(instance, evaluations=1, seed=0)
    verdict = improve_exactly(instance, start_s, nodes=100_000)
    found = words if verdict.words is None else verdict.words
    assert verdict.proved
    assert verdict.makespan_s == pytest.approx(brute_force(instance), rel=1e-9)
    assert end_times(instance, found)[0] == pytest.approx(verdict.makespan_s, rel=1e-9)
    assert fits(instance, found)
    return start_s, verdict


@pytest.mark.parametrize("seed", range(100, 127))
def test_branch_and_bound_finds_the_best_of_all_orders(seed, random_instance, brute_force):
    ranks, microbatches, chunks = SMALL[seed % len(SMALL)]
    instance = random_instance(np.random.default_rng(seed), ranks, microbatches, chunks, whole=seed % 2 == 0)
    start_s, verdict = assert_best_of_all(instance, brute_force)
    assert raise_bound(instance, 0.0, start_s, probes=30) <= verdict.makespan_s * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(130, 139))
def test_branch_and_bound_finds_the_best_of_all_orders_of_two_copies(seed, random_instance, brute_force):
    instance = random_instance(np.random.default_rng(seed), (2, 3, 4)[seed % 3], 2, whole=seed % 2 == 0, both_ways=True)
    assert_best_of_all(instance, brute_force)


@pytest.mark.parametrize("seed", range(200, 206))
def test_the_integer_programme_agrees_with_branch_and_bound(seed, random_instance):
    ranks, microbatches, chunks = [(2, 3, 1), (3, 3, 1), (2, 2, 2), (3, 2, 2)][seed % 4]
    instance = random_instance(np.random.default_rng(seed), ranks, microbatches, chunks)
    start_s, _ = climb_targets(instance, evaluations=1, seed=0)
    verdict = improve_exactly(instance, start_s, nodes=100_000)
    assert verdict.proved
    assert solve_milp(instance, start_s) == pytest.approx(verdict.makespan_s, rel=1e-5)


def test_an_order_of_192_actions_is_proved_optimal_in_few_nodes(uniform_instance):
    # The constraint solver of the published comparison needed seconds for the same proof.
    instance = uniform_instance(4, 8, 2, "wave", (10, 12, 8), 1.0, 2)
    verdict = improve_exactly(instance, 349.0, nodes=400)
    assert verdict.proved
    assert verdict.makespan_s == 349.0
