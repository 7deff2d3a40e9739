"""Galvatron's layer-wise programme against every choice of strategies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stagewright.planner.planners.galvatron import layer_strategies


@pytest.mark.parametrize("seed", range(20))
def test_the_programme_equals_every_choice_with_transitions(seed):
    draw = np.random.default_rng(seed)
    layers, strategies = int(draw.integers(2, 6)), 3
    seconds, units = draw.uniform(0.1, 1, (layers, strategies)), draw.integers(1, 9, (layers, strategies))
    change = draw.uniform(0, 0.5, (strategies, strategies))
    np.fill_diagonal(change, 0.0)
    budget = int(draw.integers(2 * layers, 7 * layers))
    best = np.inf
    for choice in itertools.product(range(strategies), repeat=layers):
        if sum(units[layer, c] for layer, c in enumerate(choice)) <= budget:
            moved = sum(change[a, b] for a, b in itertools.pairwise(choice))
            best = min(best, sum(seconds[layer, c] for layer, c in enumerate(choice)) + moved)
    found = layer_strategies(seconds, units, change, budget)
    if np.isinf(best):
        assert found is None
        return
    assert found is not None
    assert found[0] == pytest.approx(best, rel=1e-12)
    assert sum(units[layer, c] for layer, c in enumerate(found[1])) <= budget
