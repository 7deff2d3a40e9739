"""EffTra's planner (survey S4): one programme over layers and devices whose stage cost is the least over intra-layer splits.

    A(j, n) = min over i < j, m <= n of the synchronous step of the stages of A(i, n - m) and layers [i, j) on m devices,
    stage cost = min over data and model splits of the m devices

The step is sum t + (M - 1) max t and the slowest gradient reduction: Alpa's programme with two kinds of split, O(L^2)
values of the maximum, O(L^2 S D) each. Exact for that objective on equal sub-meshes; memory decides what fits, nothing is
recomputed, messages are not in it. On the common Problem all stages take the same split.
"""

from __future__ import annotations

from collections.abc import Iterator

from stagewright.planner.planners.alpa import inter_operator
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.problem import Partition


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    level = table.levels[0]
    found = inter_operator(
        (table.time_s + table.recompute_s(level))[None],
        [1],
        table.num_ranks,
        table.num_microbatches,
        most_in_flight=table.most_in_flight(level)[None],
    )
    if found is not None:
        reduction = max(float(table.reduction_s[first, end]) for first, end, _ in found.stages)
        yield found.value + reduction, table.partition(found.bounds)


PLANNER = table_planner(
    "efftra",
    "EffTra: synchronous pipelines with intra-layer parallelism by dynamic programming",
    _solve_one,
    reach=Reach(tensor=True, axis_orders=True),
    lower_bound=lambda table: table.least_rate_s,
    objective="sum t + (M - 1) max t, seconds",
)
