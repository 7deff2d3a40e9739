"""The shared programmes over cuts against every partition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from stagewright.planner.planners.range_cuts import least_bottleneck, least_sum, least_sum_and_max
from stagewright.planner.search.brute_force import all_partitions


def random_table(draw: np.random.Generator, *shape: int) -> np.ndarray:
    layers = shape[-1]
    table = draw.uniform(0.1, 1.0, (*shape[:-1], layers + 1, layers + 1))
    table[draw.random(table.shape) < 0.15] = np.inf
    table[..., np.tril_indices(layers + 1)[0], np.tril_indices(layers + 1)[1]] = np.inf
    return table


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("programme", "total"), [(least_bottleneck, max), (least_sum, sum)])
def test_the_programmes_equal_every_partition(seed, programme, total):
    draw = np.random.default_rng(seed)
    layers, stages = int(draw.integers(3, 8)), int(draw.integers(1, 4))
    table = random_table(draw, stages, layers)
    values = {
        bounds: total(table[stage, bounds[stage], bounds[stage + 1]] for stage in range(stages))
        for bounds in all_partitions(layers, stages)
    }
    found = programme(table, stages)
    if math.isinf(min(values.values())):
        assert found is None
    else:
        assert found.value == pytest.approx(min(values.values()), rel=1e-12)
        assert values[found.bounds] == pytest.approx(found.value, rel=1e-12)


def every_assignment(layers: int, devices: list[int], num_devices: int):
    """Every partition with a configuration for each stage that uses exactly `num_devices`."""
    for stages in range(1, layers + 1):
        for bounds in all_partitions(layers, stages):
            for choice in itertools.product(range(len(devices)), repeat=stages):
                if sum(devices[index] for index in choice) == num_devices:
                    yield bounds, choice


@pytest.mark.parametrize("seed", range(20))
def test_sum_and_maximum_equal_every_partition_and_configuration(seed):
    draw = np.random.default_rng(seed)
    layers, devices, num_devices = int(draw.integers(2, 6)), [1, 1, 2], int(draw.integers(1, 5))
    table = random_table(draw, 3, layers)
    limit = draw.integers(1, 5, table.shape).astype(float)
    weight = float(draw.integers(0, 8))
    best = math.inf
    for bounds, choice in every_assignment(layers, devices, num_devices):
        costs = [table[index, bounds[s], bounds[s + 1]] for s, index in enumerate(choice)]
        held = all(limit[i, bounds[s], bounds[s + 1]] >= len(choice) - s for s, i in enumerate(choice))
        if held and math.isfinite(max(costs)):
            best = min(best, sum(costs) + weight * max(costs))
    found = least_sum_and_max(table, devices, num_devices, weight, most_in_flight=limit)
    if math.isinf(best):
        assert found is None
    else:
        assert found.value == pytest.approx(best, rel=1e-12)
        assert sum(devices[index] for _, _, index in found.stages) == num_devices
