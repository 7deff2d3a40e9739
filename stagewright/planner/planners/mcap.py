"""mCAP (Dreuning et al., Euro-Par 2022): the partition whose fullest device holds least.

    min over cuts of max over stages d of  static(range) + inflight_d sum act(range) + max workspace(range)

mCAP predicts the peaks from a few profiling runs and searches C(L - 1, D - 1) cuts exhaustively or by Bayesian
optimisation; its objective is a maximum of stage terms, so the programme over cuts finds the same optimum in O(D L^2).
Optimal for the predicted peaks. Time is no part of the objective: the depth and the smallest microbatch follow from
memory alone, without recomputation unless the job demands it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.problem import Partition


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    ranks, level = table.num_ranks, table.levels[0]
    peaks = np.stack([table.peak_bytes(level, table.in_flight(stage)) for stage in range(ranks)])
    found = least_bottleneck(peaks, ranks)
    if found is not None:
        yield found.value, table.partition(found.bounds)


PLANNER = table_planner(
    "mcap",
    "Dreuning et al., mCAP: Memory-Centric Partitioning for Large-Scale Pipeline-Parallel DNN Training, Euro-Par 2022",
    _solve_one,
    reach=Reach(),
    objective="bytes of the fullest device",
)
