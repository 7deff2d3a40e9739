"""Annealing keeps every order valid and its incremental times equal to a full sweep."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.schedules.auto.annealing import anneal
from stagewright.planner.schedules.auto.climbing import climb_targets
from stagewright.planner.schedules.auto.sweep import end_times
from stagewright.planner.schedules.auto.word import fits, label


@pytest.mark.parametrize("seed", range(20))
def test_incremental_makespan_equals_a_full_sweep_and_the_caps_hold(seed, random_instance):
    rng = np.random.default_rng(seed)
    instance = random_instance(rng, int(rng.integers(2, 6)), int(rng.integers(2, 9)), int(rng.integers(1, 4)))
    start_s, words = climb_targets(instance, evaluations=1, seed=0)
    best_s, best_words, moves = anneal(instance, words, moves=3000, temperature_s=0.1, bound_s=0.0, seed=seed)
    assert moves == 3000
    assert best_s == end_times(instance, best_words)[0] <= start_s
    assert fits(instance, best_words)
    for rank, length in enumerate(instance.tables.lengths):
        word = best_words[rank, :length]
        assert np.array_equal(label(word // instance.num_microbatches, instance.num_microbatches), word)


def test_same_seed_gives_the_same_order_and_another_seed_another_path(uniform_instance):
    instance = uniform_instance(4, 8, 2, "wave", (10, 12, 8), 1.0, 3)
    _, words = climb_targets(instance, evaluations=1, seed=0)
    runs = [anneal(instance, words, moves=20_000, temperature_s=1.0, bound_s=0.0, seed=seed)[1] for seed in (1, 1, 2)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_annealing_reaches_the_optimum_of_a_tight_instance(uniform_instance):
    # 192 actions; a constraint solver proved 349.
    instance = uniform_instance(4, 8, 2, "wave", (10, 12, 8), 1.0, 2)
    start_s, words = climb_targets(instance, evaluations=1, seed=0)
    best_s = min(
        anneal(instance, words, moves=200_000, temperature_s=share, bound_s=0.0, seed=seed)[0]
        for seed, share in enumerate((0.15, 0.5, 0.5, 1.0))
    )
    assert start_s > 400
    assert 349.0 <= best_s <= 355.0
