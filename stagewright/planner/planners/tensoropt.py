"""TensorOpt (Cai et al., TPDS 2021): frontier tracking, the Pareto set of (memory, time) instead of one optimum.

    F(o_i, s) = reduce( union over s' of F(o_{i-1}, s') x (mem(o_i, s), t(o_i, s) + x(o_{i-1}, s', o_i, s)) )

reduce sorts by memory and keeps what is faster than everything smaller, O(K log K). Graphs come down to a chain by
eliminating nodes and edges whose entries are frontiers (`optcnn.frontier`). O(N S^2 |F| log |F|); exact for chains and
series-parallel graphs. Layers run in sequence, without pipeline or overlap.

On the common Problem there is one stage; a layer's strategies are its recomputation levels, the degrees are equal for
all layers. Layers that are alike are added one class at a time by counts. The planner takes the fastest point that fits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from stagewright.planner.planners.optcnn import ConfigurationGraph, Frontier, frontier
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.problem import Partition

Floats = npt.NDArray[np.float64]


def chain_frontier(
    nodes: tuple[tuple[tuple[float, float], ...], ...], change_s: tuple[tuple[tuple[float, ...], ...], ...]
) -> Frontier:
    """Return the Pareto set of a chain: (bytes, seconds) of each strategy, and seconds between neighbours' strategies."""
    edges = tuple((index, index + 1, table) for index, table in enumerate(change_s))
    return frontier(ConfigurationGraph(nodes, edges))


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    """Yield the fastest point of the frontier that fits: by counts, this is the least recomputation."""
    found = table.least(0, table.num_layers, 1)
    if found is None:
        return
    seconds = float(table.time_s[0, -1]) + found.seconds
    partition = Partition((0, table.num_layers), table.least_levels(0, table.num_layers, 1))
    yield table.num_microbatches * seconds + float(table.step_s[0, -1]), partition


PLANNER = table_planner(
    "tensoropt",
    "Cai et al., TensorOpt: Exploring the Tradeoffs in Distributed DNN Training with Auto-Parallelism, TPDS 2021",
    _solve_one,
    reach=Reach(pipeline=False, tensor=True, experts=True, zero=(0, 1, 2, 3)),
    objective="seconds at the fastest point that fits",
)
