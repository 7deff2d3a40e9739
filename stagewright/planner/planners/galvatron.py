"""Galvatron's layer-wise programme (Miao et al., VLDB 2022; BMW, TKDE 2024): a strategy for each layer under a memory budget.

    C(L, E) = min over S of  C(L - 1, E - mem(L, S)) + c(L, S) + R(S_{L-1}, S)

with E in whole units of memory, c the layer's time under strategy S and R the cost of changing strategies between
layers. O(L E S^2), exact for costs in units (memory is rounded up, so what fits in units fits). The outer loop runs over
depths and over two partitions of each, balanced by time and balanced by memory (the "bi-objective" of BMW); stages are
joined by sum t + (B - 1) max t, which can fall below the time of any real schedule.

On the common Problem a strategy of a layer is its recomputation level (CKPT); DP, SDP (ZeRO-3) and TP are the
configuration's, equal for all layers, so R is zero. With `per_stage_degrees` layers of one pipeline rank also choose DP, SDP and TP,
with R between them (`galvatron_layers`); those plans and the ones of equal degrees are ranked by the common simulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Plan
from stagewright.planner.planners.galvatron_layers import layerwise_plan
from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.scoring import with_plans
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Partition, Problem
from stagewright.planner.search.space import allows, divisors

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

UNITS = 400
_ZERO = (0, 3)  # DP and SDP


def layer_strategies(
    seconds: Floats, units: Ints, change_s: Floats, budget: int
) -> tuple[float, tuple[int, ...]] | None:
    """Return the least time and the strategy of each layer within the budget; None when nothing fits.

    Parameters
    ----------
    seconds, units : [L, S], of each layer under each strategy; units of memory are whole.
    change_s : [S, S], between a layer's strategy (row) and the next one's (column); [L - 1, S, S] where layers differ.
    """
    layers, strategies = seconds.shape
    between = np.broadcast_to(change_s, (max(layers - 1, 0), strategies, strategies))
    value = np.full((strategies, budget + 1), np.inf)
    choices = np.zeros((layers, strategies, budget + 1), dtype=np.int64)
    for layer in range(layers):
        if layer:
            through = value[:, None, :] + between[layer - 1][:, :, None]
            choices[layer] = np.argmin(through, axis=0)
            before = through.min(axis=0)
        else:
            before = np.zeros((strategies, budget + 1))
        value = np.full((strategies, budget + 1), np.inf)
        for chosen in range(strategies):
            need = int(units[layer, chosen])
            if need <= budget:
                value[chosen, need:] = before[chosen, : budget + 1 - need] + seconds[layer, chosen]
    last = int(np.argmin(value[:, budget]))
    if not np.isfinite(value[last, budget]):
        return None
    found, left = [last], budget
    for layer in range(layers - 1, 0, -1):
        left -= int(units[layer, found[-1]])
        found.append(int(choices[layer, found[-1], left]))
    return float(value[last, budget]), tuple(reversed(found))


def _stage(table: StageTable, stage: int, first: int, end: int) -> tuple[float, tuple[int, ...]] | None:
    """Return the seconds a stage's recomputation adds, and the level of each of its layers."""
    costs, levels = table.costs, np.array(table.levels)
    workspace = costs.workspace_bytes[levels, first:end]
    best: tuple[float, tuple[int, ...]] | None = None
    for ceiling in np.unique(workspace):
        room = table.room_bytes - float(table.static_bytes[first, end]) - float(ceiling)
        if room <= 0:
            break
        kept = table.in_flight(stage) * costs.kept_bytes[levels, first:end].T
        units = np.minimum(np.ceil(kept / room * UNITS * (1 - 1e-12)), UNITS + 1).astype(np.int64)
        seconds = np.where(ceiling >= workspace.T, costs.recompute_s[levels, first:end].T, np.inf)
        found = layer_strategies(seconds, units, np.zeros((len(levels), len(levels))), UNITS)
        if found is not None and (best is None or found[0] < best[0]):
            best = (found[0], tuple(int(levels[index]) for index in found[1]))
    return best


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    ranks, lowest = table.num_ranks, table.levels[0]
    by_memory = np.stack([table.peak_bytes(lowest, table.in_flight(stage)) for stage in range(ranks)])
    balanced = [least_bottleneck(table.time_s, ranks), least_bottleneck(by_memory, ranks)]
    for bounds in sorted({cut.bounds for cut in balanced if cut is not None}):
        stages = [_stage(table, stage, first, end) for stage, (first, end) in enumerate(pairwise(bounds))]
        chosen = [stage for stage in stages if stage is not None]
        if len(chosen) < ranks:
            continue
        times = [float(table.time_s[a, b]) + found[0] for (a, b), found in zip(pairwise(bounds), chosen, strict=True)]
        reduction = max(float(table.reduction_s[a, b]) for a, b in pairwise(bounds))
        value = sum(times) + (table.num_microbatches - 1) * max(times) + reduction
        yield value, Partition(bounds, tuple(level for _, levels in chosen for level in levels))


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the best plan of equal degrees and, where stages may differ, of degrees by layer."""
    uniform = _EQUAL.solve(problem, limits)
    space = problem.job.space
    plain = (("pp", 1), ("cp", 1), ("ep", 1), ("etp", 1))
    if not space.per_stage_degrees or problem.profile.trained_ties or problem.profile.edges is not None:
        return uniform
    zero_stages = [zero for zero in _ZERO if zero in space.zero and allows(space, "zero", zero)]
    if not zero_stages or not all(allows(space, name, value) for name, value in plain):
        return uniform
    plans: list[tuple[float, Plan]] = []
    for samples in divisors(problem.job.global_batch):
        if limits.reached() is not None:
            break
        found = layerwise_plan(problem, samples, layer_strategies, _EQUAL.name, zero_stages)
        if found is not None and len(found[1].stages) > 1:
            plans.append(found)
    return with_plans(problem, limits, uniform, plans)


_EQUAL = table_planner(
    "galvatron",
    "Miao et al., Galvatron: Efficient Transformer Training over Multiple GPUs Using Automatic Parallelism, VLDB 2022",
    _solve_one,
    reach=Reach(tensor=True, zero=_ZERO, axis_orders=True),
    lower_bound=lambda table: table.least_rate_s,
    objective="sum t + (B - 1) max t, seconds",
    aliases=("galvatron-bmw",),
)

PLANNER = replace(_EQUAL, solve=solve, by_stage=True)
