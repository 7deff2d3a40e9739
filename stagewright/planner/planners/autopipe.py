"""AutoPipe's planner (Liu et al., CLUSTER 2022): balance, then move layers off the master stage while the step falls.

    1  the partition whose slowest stage is fastest
    2  simulate 1F1B; the master stage is the one its critical path runs on longest
    3  for the boundaries up to the master stage's end: move the last layer before the boundary to the later stage;
       keep the best of these moves if the simulated step falls, and go back to 2

O(N^2 D) for the balance, one simulation for each move tried. No optimality: a local optimum of moves towards later
stages. AutoPipe's sub-layers (attention and feed-forward apart) are the profile's layers here; its slicer, which halves
the first microbatches, is the schedule `autopipe`. Recomputation is all or nothing, the weakest level that fits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.problem import Partition


def master_stage(table: StageTable, partition: Partition) -> int:
    """Return the stage on which the critical path of the simulation spends most seconds."""
    pipeline = table.problem.pipeline(table.candidate, partition)
    order = table.problem.order(table.candidate)
    _, path = order.trace(pipeline.costs, pipeline.hop_s, pipeline.tail_s)
    return int(np.argmax((path.counts * pipeline.costs).sum(axis=0)))


def shifted(table: StageTable, partition: Partition) -> tuple[float, Partition]:
    """Return the simulated step and the partition after moves off the master stage; never slower than at first."""
    problem, candidate = table.problem, table.candidate
    best = problem.step_s(candidate, partition)
    while True:
        moves = []
        for boundary in range(1, min(master_stage(table, partition) + 1, table.num_ranks - 1) + 1):
            bounds = list(partition.bounds)
            bounds[boundary] -= 1
            if bounds[boundary] <= bounds[boundary - 1]:
                continue
            moved = Partition(tuple(bounds), partition.levels)
            if problem.fits(candidate, moved):
                moves.append((problem.step_s(candidate, moved), moved))
        step_s, moved = min(moves, key=lambda move: move[0], default=(np.inf, partition))
        if step_s >= best * (1 - 1e-12):
            return best, partition
        best, partition = step_s, moved


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    found = least_bottleneck(table.time_s, table.num_ranks)
    if found is None:
        return
    for level in table.levels:
        partition = table.partition(found.bounds, level)
        if table.problem.fits(table.candidate, partition):
            yield shifted(table, partition)
            return


PLANNER = table_planner(
    "autopipe",
    "Liu et al., AutoPipe: A Fast Pipeline Parallelism Approach with Balanced Partitioning and Micro-batch Slicing, "
    "CLUSTER 2022",
    _solve_one,
    reach=Reach(),
    lower_bound=lambda table: table.least_rate_s,
    objective="simulated seconds of 1F1B",
)
