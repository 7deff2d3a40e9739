"""vPipe: the fixed point is never worse than its start, and no neighbour beats it."""

from __future__ import annotations

import pytest

from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.vpipe import neighbours, settled, slowest_s
from tests.planner.planners.test_adapipe import four_ranks


@pytest.mark.parametrize("memory_bytes", [50e6, 60e6, 80e6, 120e6, 1e9])
def test_the_fixed_point_is_never_worse_than_its_start(memory_bytes):
    problem = four_ranks(memory_bytes)
    table = StageTable(problem, problem.candidates()[0])
    start = least_bottleneck(table.time_s, 4)
    assert start is not None
    value, bounds = settled(table, start.bounds)
    assert value <= slowest_s(table, start.bounds)
    assert all(slowest_s(table, moved) >= value * (1 - 1e-12) for moved in neighbours(bounds))


def test_repartition_gains_where_memory_binds():
    problem = four_ranks(45e6)
    table = StageTable(problem, problem.candidates()[0])
    start = least_bottleneck(table.time_s, 4)
    assert start is not None
    assert settled(table, start.bounds)[0] < 0.95 * slowest_s(table, start.bounds)
