"""vPipe's search (Zhao et al., TPDS 2022): memory actions and the partition in turn, to a fixed point.

    a  fixed partition: for each stage the memory actions of least added time that fit, a knapsack solved exactly
    b  fixed actions:   one layer moves between neighbours where that lowers the slowest stage, its actions chosen anew
    repeat until neither lowers the slowest stage

Never worse than its start, the partition balanced by time; a local optimum, O(moves D) knapsacks. The actions here are
keep and recompute at the levels of the profile; swapping to the host, vPipe's third, is not a level that plans hold.
The live migration that follows a new partition is a matter of the runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.problem import Partition


def slowest_s(table: StageTable, bounds: tuple[int, ...]) -> float:
    """Return the seconds of the slowest stage with the best memory actions; infinite when one does not fit."""
    return max(stage_s(table, stage, first, end) for stage, (first, end) in enumerate(pairwise(bounds)))


def stage_s(table: StageTable, stage: int, first: int, end: int) -> float:
    """Return the seconds of one stage with the memory actions of least added time."""
    found = table.least(first, end, table.in_flight(stage))
    return float("inf") if found is None else float(table.time_s[first, end]) + found.seconds


def settled(table: StageTable, bounds: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Return the slowest stage and the bounds at the fixed point that follows `bounds`."""
    best = slowest_s(table, bounds)
    while True:
        moves = [(slowest_s(table, moved), moved) for moved in neighbours(bounds)]
        value, moved = min(moves, default=(float("inf"), bounds))
        if value >= best * (1 - 1e-12):
            return best, bounds
        best, bounds = value, moved


def neighbours(bounds: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the bounds after each move of one layer across one boundary."""
    found = []
    for boundary in range(1, len(bounds) - 1):
        for step in (-1, 1):
            moved = [*bounds[:boundary], bounds[boundary] + step, *bounds[boundary + 1 :]]
            if moved[boundary - 1] < moved[boundary] < moved[boundary + 1]:
                found.append(tuple(moved))
    return found


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    start = least_bottleneck(table.time_s, table.num_ranks)
    if start is None:
        return
    value, bounds = settled(table, start.bounds)
    partition = table.fitted(bounds)
    if partition is not None:
        yield table.num_microbatches * value, partition


PLANNER = table_planner(
    "vpipe",
    "Zhao et al., vPipe: A Virtualized Acceleration System for Efficient and Scalable Pipeline Parallel DNN Training, "
    "TPDS 2022",
    _solve_one,
    reach=Reach(),
    lower_bound=lambda table: table.least_rate_s,
    objective="seconds of a step at the slowest stage's rate",
)
