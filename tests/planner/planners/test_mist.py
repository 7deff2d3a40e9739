"""Mist's programme between stages against every partition."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.planners.mist import inter_stage
from stagewright.planner.planners.stage_table import ranges_of
from stagewright.planner.search.brute_force import all_partitions


@pytest.mark.parametrize("seed", range(8))
def test_the_integer_programme_equals_every_partition(seed):
    draw = np.random.default_rng(seed)
    layers, stages, count = int(draw.integers(4, 8)), int(draw.integers(2, 4)), int(draw.integers(1, 9))
    steady = np.stack([ranges_of(draw.uniform(0.5, 1.5, layers)) for _ in range(stages)])
    steady[draw.random(steady.shape) < 0.1] = np.inf
    once = ranges_of(draw.uniform(0, 2, layers))
    best = np.inf
    for bounds in all_partitions(layers, stages):
        times = [steady[s, bounds[s], bounds[s + 1]] for s in range(stages)]
        if np.isfinite(times).all():
            waits = [once[bounds[s], bounds[s + 1]] - sum(times[:s]) for s in range(stages)]
            best = min(best, (count - 1) * max(times) + sum(times) + max(0.0, *waits))
    found = inter_stage(steady, once, count)
    assert (found is None) == np.isinf(best)
    if found is not None:
        assert found.value == pytest.approx(best, rel=1e-5)
