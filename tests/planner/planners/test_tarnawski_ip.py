"""The contiguous integer programme agrees with the dynamic programme."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.stage_table import ranges_of
from stagewright.planner.planners.tarnawski_ip import contiguous_load


def test_a_chain_of_1_to_6_on_three_devices_takes_9_contiguously():
    found = contiguous_load(np.arange(1.0, 7.0), np.zeros(7), np.zeros(6), 3)
    assert found is not None
    assert found.value == 9


@pytest.mark.parametrize("seed", range(8))
def test_the_integer_programme_equals_the_dynamic_programme(seed):
    draw = np.random.default_rng(seed)
    layers, devices = int(draw.integers(4, 9)), int(draw.integers(2, 4))
    layer_s, cut_s, size = draw.uniform(0.1, 1, layers), draw.uniform(0, 0.4, layers + 1), draw.uniform(0.1, 1, layers)
    cut_s[[0, -1]] = 0.0
    room = float(draw.uniform(1.0, 1.6)) * size.sum() / devices
    cost = ranges_of(layer_s) + cut_s[:, None] + cut_s[None, :]
    cost = np.where(ranges_of(size) <= room, cost, np.inf)
    wanted = least_bottleneck(cost, devices)
    found = contiguous_load(layer_s, cut_s, size, devices, memory_bytes=room)
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert found.value == pytest.approx(wanted.value, rel=1e-6)
