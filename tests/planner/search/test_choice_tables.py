"""Recomputation bounded at prices of a byte: never above what exact levels take, and above what one price sees."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import numpy as np
import pytest

from stagewright.planner.search.choice_tables import ChoiceTables, halves


def _tables(slower: np.ndarray, spared: np.ndarray, spared_late: np.ndarray) -> ChoiceTables:
    """Return tables of choices that differ in recomputation alone, from [n, levels, C]."""
    flat = np.zeros((slower.shape[0], slower.shape[2]))
    named = {"slower": slower, "spared": spared, "spared_late": spared_late, "latency": np.zeros(len(slower))}
    return ChoiceTables(**{field.name: named.get(field.name, flat) for field in fields(ChoiceTables)})


def _bound(tables: ChoiceTables, numbers: np.ndarray, live: np.ndarray, short: float) -> float:
    """Return the bound of so many layers of each class that are `short` bytes over, of `live` microbatches."""
    price, gain = tables.prices(np.array([live[0] / live.sum()]), numbers)
    return max(0.0, float((price[0] * short / live.sum() - gain[0] @ numbers).max()))


def _least(tables: ChoiceTables, choice: int, numbers: np.ndarray, live: np.ndarray, short: float) -> float:
    """Return the least seconds of levels by layer that save enough, over all of them."""
    of_layer = np.repeat(np.arange(len(numbers)), numbers)
    least = float("inf")
    for levels in product(range(tables.slower.shape[1]), repeat=len(of_layer)):
        at = (choice, np.array(levels), of_layer)
        if (live[0] * tables.spared[at] + live[1] * tables.spared_late[at]).sum() >= short:
            least = min(least, float(tables.slower[at].sum()))
    return least


@pytest.mark.parametrize("seed", range(20))
def test_recomputation_at_prices_is_at_most_the_exact_least_of_every_choice_of_a_set(seed: int) -> None:
    draw = np.random.default_rng(seed)
    size = (3, 3, 2)
    slower, spared, late = draw.uniform(0, 1, size), draw.uniform(0, 5, size), draw.uniform(-1, 2, size)
    for values in (slower, spared, late):
        values[:, 0] = 0.0
    tables, numbers = _tables(slower, spared, late), np.array([3, 1], dtype=np.int32)
    live = np.array([draw.integers(1, 5), draw.integers(0, 3)], dtype=np.float64)
    for short in draw.uniform(0, 20 * live.sum(), 6).tolist():
        least = [_least(tables, choice, numbers, live, short) for choice in range(3)]
        assert _bound(tables, numbers, live, short) <= min(least) + 1e-9
        for choice in range(3):
            alone = tables.take(np.array([choice]))
            assert _bound(alone, numbers, live, short) <= least[choice] + 1e-9


def test_what_the_first_level_can_not_save_is_bought_at_the_price_of_the_second() -> None:
    """Selective recomputation saves 2 bytes for 0.1 s, full 10 for 4.1; 4 layers that are 24 short pay for full ones."""
    tables = _tables(np.array([[[0.0], [0.1], [4.1]]]), np.array([[[0.0], [2.0], [10.0]]]), np.zeros((1, 3, 1)))
    numbers, live = np.array([4], dtype=np.int32), np.array([1.0, 0.0])
    assert _least(tables, 0, numbers, live, 24.0) == pytest.approx(2 * 4.1 + 2 * 0.1)
    assert _bound(tables, numbers, live, 24.0) == pytest.approx(2 * 4.1 + 2 * 0.1)
    assert _bound(tables, numbers, live, 8.0) == pytest.approx(4 * 0.1)


def test_levels_that_save_nothing_cost_nothing_at_any_price() -> None:
    tables = _tables(np.zeros((2, 1, 2)), np.zeros((2, 1, 2)), np.zeros((2, 1, 2)))
    assert _bound(tables, np.array([1, 2], dtype=np.int32), np.array([2.0, 0.0]), 100.0) == 0.0


def test_halves_cut_the_widest_column_in_the_middle_and_equal_rows_by_number() -> None:
    low, high = halves(np.array([[1.0, 0.0], [1.1, 9.0], [1.2, 2.0], [1.3, 8.0]]))
    assert (low.tolist(), high.tolist()) == ([0, 2], [1, 3])
    low, high = halves(np.ones((3, 2)))
    assert (low.tolist(), high.tolist()) == ([0], [1, 2])
