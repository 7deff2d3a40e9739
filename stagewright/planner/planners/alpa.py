"""Alpa's inter-operator pass (Zheng et al., OSDI 2022): stages on sub-meshes, least T* = sum t_i + (B - 1) max t_j.

For each t_max among the stage times, ascending, until B t_max alone passes the best,

    F(s, k, d; t_max) = min over i > k and sub-meshes (n, m) of t_intra(k, i, n x m) + F(s - 1, i, d - n m; t_max),
    t_intra <= t_max,   mem_stage + s mem_act <= mem_device,      F(0, L, 0) = 0,

with s counted from the end, the in-flight count of 1F1B: O(L^2) values of t_max, O(L^2 S D) each. `inter_operator` takes
t_intra as the least over the configurations of each sub-mesh that the caller prices; on the common Problem these are
the seconds of the intra-operator programme (`alpa_intra`) and each range's share of the gradients' reduction.

Exact for T* given t_intra. T* is GPipe's step and up to 13 % above 1F1B's (it guides, it is no bound); the two passes
are not optimal together, communication between stages and its overlap are not in T*, recomputation is all or nothing.

On the common Problem all stages have equal degrees, so each configuration is its own sub-mesh shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.alpa_intra import IntraOperator
from stagewright.planner.planners.range_cuts import StagesOnDevices, least_sum_and_max
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import choices_outcome, choices_over
from stagewright.planner.planners.stage_table import StageTable, ranges_of
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Partition, Problem

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


def stage_seconds(table: StageTable, level: int, layer_s: Floats) -> Floats:
    """Return t_intra of every range: one microbatch of its layers [L], and its share of the gradients' reduction."""
    time_s = ranges_of(layer_s) + 2.0 * table.overhead_s
    return np.asarray(time_s + table.recompute_s(level) + table.reduction_s / table.num_microbatches)


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of least T* over the configurations; each is its own sub-mesh shape."""
    intra = IntraOperator()

    def solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
        layer_s = intra.layer_s(table)
        if not np.isfinite(layer_s).all():
            return
        configuration = table.configuration
        for level in table.levels:
            found = inter_operator(
                stage_seconds(table, level, layer_s)[None],
                [1],
                configuration.num_ranks,
                configuration.num_microbatches,
                most_in_flight=table.most_in_flight(level)[None],
            )
            if found is not None:
                yield found.value, table.partition(found.bounds, level)
                return

    def lower_bound(table: StageTable) -> float:
        """Return a T* that no partition beats: all layers once, and equal stages for the other microbatches."""
        return float(intra.least_s(table).sum()) * (1.0 + (table.num_microbatches - 1) / table.num_ranks)

    choices = choices_over(problem, limits, _REACH, solve_one, lower_bound=lower_bound)
    return choices_outcome(problem, limits, choices, PLANNER.name)


_REACH = Reach(tensor=True, experts=True, zero=(0, 2, 3), axis_orders=True)

PLANNER = NamedPlanner(
    "alpa",
    "Zheng et al., Alpa: Automating Inter- and Intra-Operator Parallelism for Distributed Deep Learning, OSDI 2022",
    solve,
    objective="sum t + (B - 1) max t, seconds",
)
