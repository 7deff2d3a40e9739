"""PipeDream-2BW's planner (Narayanan et al., ICML 2021): every width, depth, microbatch and recomputation of equal blocks.

With w replicas of d stages, microbatches of b samples and T >= d of them in a batch of b w T,

    t(w, d, b) = max( max_i ( c_r comp_i + messages_i ),  DP-comm / T ),      throughput = b w / t
    mem_i      = 2 |W_i| + states + ( r ? d A_in + A_full : d A_full )        <= device

with c_r the extra forward of recomputation. O(#divisors #b): exhaustive over equal-block plans, nothing beyond; costs
come from blocks as they are profiled. The model is the steady state of double-buffered weights, so the fill and the
drain of a pipeline are not in it; plans here run 1F1B with a flush, which pays them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stagewright.planner.planners.megatron import equal_blocks
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.problem import Partition

Floats = npt.NDArray[np.float64]


def period_s(table: StageTable, bounds: tuple[int, ...], level: int) -> float:
    """Return the seconds of one microbatch in the steady state."""
    first, end = _ends(bounds)
    hop = table.hop_s
    compute = (table.time_s + table.recompute_s(level))[first, end] + 2.0 * (hop[first] + hop[end])
    return float(max(compute.max(), table.reduction_s[first, end].max() / table.num_microbatches))


def fits_double_buffered(table: StageTable, bounds: tuple[int, ...], level: int) -> bool:
    """Tell whether every stage holds two versions of its weights and its activations."""
    first, end = _ends(bounds)
    held = table.peak_bytes(level, table.in_flight(0)) + table.parameter_bytes
    return bool((held[first, end] <= table.room_bytes).all())


def _ends(bounds: tuple[int, ...]) -> tuple[list[int], list[int]]:
    return [a for a, _ in pairwise(bounds)], [b for _, b in pairwise(bounds)]


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    if table.num_microbatches < table.num_ranks:
        return
    bounds = equal_blocks(table.problem, table.num_ranks)
    for level in table.levels:
        if fits_double_buffered(table, bounds, level):
            yield table.num_microbatches * period_s(table, bounds, level), table.partition(bounds, level)


PLANNER = table_planner(
    "pipedream-2bw",
    "Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, ICML 2021",
    _solve_one,
    reach=Reach(),
    objective="seconds of T microbatches in the steady state",
    aliases=("2bw",),
)
