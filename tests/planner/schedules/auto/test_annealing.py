"""Annealing keeps every order valid and its incremental times equal to a full sweep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stagewright.planner.schedules.auto.annealing import _flip_chains, _index, _undo_flips, anneal
from stagewright.planner.schedules.auto.block import search_blocks
from stagewright.planner.schedules.auto.climbing import climb_targets
from stagewright.planner.schedules.auto.draw import seeded
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
    _assert_valid(instance, best_words)


def _assert_valid(instance, words) -> None:
    assert fits(instance, words)
    for rank, length in enumerate(instance.tables.lengths):
        word = words[rank, :length]
        assert np.array_equal(label(word // instance.num_microbatches, instance.num_microbatches), word)


@pytest.mark.parametrize("seed", range(12))
def test_two_copies_are_ordered_without_deadlock_under_the_least_caps(seed, random_instance):
    rng = np.random.default_rng(seed)
    instance = random_instance(rng, int(rng.integers(2, 7)), 2 * int(rng.integers(1, 6)), both_ways=True)
    instance = replace(instance, cap=instance.microbatch_memory * (1.0 + rng.choice([0.0, 0.5]) * rng.random()))
    listed_s, listed = climb_targets(instance, evaluations=40, seed=seed)
    _assert_valid(instance, listed)
    assert listed_s == end_times(instance, listed)[0] < np.inf
    best_s, words, _ = anneal(instance, listed, moves=2000, temperature_s=0.1, bound_s=0.0, seed=seed)
    _assert_valid(instance, words)
    assert best_s == end_times(instance, words)[0] <= listed_s
    block_s, words = search_blocks(instance, moves=500, seed=seed)
    if np.isfinite(block_s):
        _assert_valid(instance, words)
        assert block_s == end_times(instance, words)[0]


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


@pytest.mark.parametrize("seed", range(12))
def test_exchanged_streams_keep_the_order_valid_and_can_be_taken_back(seed, random_instance):
    rng = np.random.default_rng(seed)
    instance = random_instance(rng, int(rng.integers(2, 6)), int(rng.integers(3, 9)), int(rng.integers(2, 5)))
    _, words = climb_targets(instance, evaluations=8, seed=0)
    tables = instance.tables
    place, live = np.empty(instance.num_actions, dtype=np.int32), np.zeros(words.shape)
    _index(tables, words, place, live)
    flips = np.empty((2 * instance.num_letters, 3), dtype=np.int32)
    state = seeded(seed)
    for _ in range(200):
        rank = int(rng.integers(instance.num_ranks))
        before = words.copy(), place.copy(), live.copy()
        count = _flip_chains(tables, words, place, live, rank, int(rng.integers(tables.lengths[rank])), flips, state)
        assert fits(instance, words)
        for own, length in enumerate(tables.lengths):
            word = words[own, :length]
            assert np.array_equal(label(word // instance.num_microbatches, instance.num_microbatches), word)
            assert np.array_equal(place[word], np.arange(length))
        _undo_flips(tables, words, place, live, flips, count)
        assert np.array_equal(words, before[0])
        assert np.array_equal(place, before[1])
        assert live == pytest.approx(before[2])


def test_exchanged_streams_lead_out_of_orders_that_single_moves_do_not_leave(uniform_instance):
    # Four chunks in a loop under half of 1F1B's memory; without the exchanges the best of the four runs is 28.25.
    instance = uniform_instance(7, 6, 4, "loop", cap=3.5)
    start_s, words = search_blocks(instance, moves=20_000, seed=0)
    best_s = min(
        anneal(instance, words, moves=40_000, temperature_s=0.1, bound_s=0.0, seed=seed)[0] for seed in range(4)
    )
    assert start_s > 30.0
    assert best_s <= 27.5
