"""Alpa's inter-operator pass (Zheng et al., OSDI 2022): stages on sub-meshes, least T* = sum t_i + (B - 1) max t_j.

For each t_max among the stage times, ascending, until B t_max alone passes the best,

    F(s, k, d; t_max) = min over i > k and sub-meshes (n, m) of t_intra(k, i, n x m) + F(s - 1, i, d - n m; t_max),
    t_intra <= t_max,   mem_stage + s mem_act <= mem_device,      F(0, L, 0) = 0,

with s counted from the end, the in-flight count of 1F1B: O(L^2) values of t_max, O(L^2 S D) each. `inter_operator` takes
t_intra as the least over the configurations of each sub-mesh that the caller prices; the intra-operator pass is one more
way to price them.

Exact for T* given t_intra. T* is GPipe's step and up to 13 % above 1F1B's (it guides, it is no bound); the two passes
are not optimal together, communication between stages and its overlap are not in T*, recomputation is all or nothing.

On the common Problem all stages have equal degrees, so each configuration is its own sub-mesh shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from stagewright.planner.planners.range_cuts import StagesOnDevices, least_sum_and_max
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.problem import Partition

Floats = npt.NDArray[np.float64]


def inter_operator(
    stage_s: Floats,
    devices: Sequence[int],
    num_devices: int,
    num_microbatches: int,
    *,
    most_in_flight: Floats | None = None,
) -> StagesOnDevices | None:
    """Return the stages of least T* on exactly `num_devices`; None when none fit.

    Parameters
    ----------
    stage_s : [C, L + 1, L + 1], seconds of one microbatch of layers [i, j) on each of C sub-mesh configurations.
    devices : [C], of each sub-mesh.
    most_in_flight : [C, L + 1, L + 1], microbatches whose activations fit.
    """
    return least_sum_and_max(stage_s, devices, num_devices, float(num_microbatches - 1), most_in_flight=most_in_flight)


def stage_seconds(table: StageTable, level: int) -> Floats:
    """Return t_intra of every range: one microbatch, and its share of the gradients' reduction."""
    count = table.num_microbatches
    return np.asarray(table.time_s + table.recompute_s(level) + table.reduction_s / count)


def _lower_bound(table: StageTable) -> float:
    """Return a T* that no partition beats: all layers once, and equal stages for the other microbatches."""
    whole = float((table.costs.time_s).sum())
    return whole * (1.0 + (table.num_microbatches - 1) / table.num_ranks)


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    configuration = table.configuration
    for level in table.levels:
        found = inter_operator(
            stage_seconds(table, level)[None],
            [1],
            configuration.num_ranks,
            configuration.num_microbatches,
            most_in_flight=table.most_in_flight(level)[None],
        )
        if found is not None:
            yield found.value, table.partition(found.bounds, level)
            return


PLANNER = table_planner(
    "alpa",
    "Zheng et al., Alpa: Automating Inter- and Intra-Operator Parallelism for Distributed Deep Learning, OSDI 2022",
    _solve_one,
    reach=Reach(tensor=True, experts=True, zero=(0, 2, 3), axis_orders=True),
    lower_bound=_lower_bound,
    objective="sum t + (B - 1) max t, seconds",
)
