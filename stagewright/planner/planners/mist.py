"""Mist (Zhu et al., EuroSys 2025): Pareto points inside stages, an integer programme between them.

A stage of layers [i, j) at position s offers points (t, d): seconds of a steady microbatch, and what the first and last
ones add (gradients reduced, optimizer run). One binary y for each offered point; the stages of a pipeline are a path:

    min (G - 1) z + sum t y + w
    s.t.  sum_j y[s, i, j] = sum_h y[s - 1, h, i]  for all s > 0, i;   sum_j y[0, 0, j] = 1 = sum_i y[D - 1, i, L]
          z >= sum t y[s]  for all s;     w >= sum d y[s] - sum_{r < s} sum t y[r]  for all s

modelled in PuLP, solved by HiGHS, exact for this objective over the points offered. On the common Problem degrees and
ZeRO are the configuration's, and each range at each position offers one point: its least recomputation that fits, by
the exact knapsack. The programme runs on the
NUM_PROGRAMS configurations whose balanced pipelines are fastest, for a few seconds each. Ranges more than SLACK above the best bottleneck are left out. Offload, Mist's
other memory lever, is not a level that plans hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pulp

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.range_cuts import Cut, least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import Choice, choices_outcome, choices_over
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Partition, Problem

Floats = npt.NDArray[np.float64]

SLACK = 1.1
NUM_PROGRAMS = 6


def inter_stage(steady_s: Floats, once_s: Floats, num_microbatches: int, *, time_limit_s: float = 3.0) -> Cut | None:
    """Return the partition of least objective; None when there is none.

    Parameters
    ----------
    steady_s : [D, L + 1, L + 1], seconds of a microbatch; infinite where no point is offered.
    once_s : [L + 1, L + 1], seconds once a step.
    """
    stages, layers = len(steady_s), steady_s.shape[1] - 1
    scale = 1.0 / float(steady_s[np.isfinite(steady_s)].max(initial=1e-12))
    arcs = {
        (s, int(i), int(j)): pulp.LpVariable(f"y_{s}_{i}_{j}", cat="Binary")
        for s in range(stages)
        for i, j in zip(*np.nonzero(np.isfinite(steady_s[s])), strict=True)
        if (i == 0) == (s == 0) and (j == layers) == (s == stages - 1)
    }
    model = pulp.LpProblem("inter_stage", pulp.LpMinimize)
    slowest, wait = pulp.LpVariable("slowest", 0), pulp.LpVariable("wait", 0)
    steady = [
        pulp.lpSum(scale * float(steady_s[key]) * y for key, y in arcs.items() if key[0] == s) for s in range(stages)
    ]
    model += (num_microbatches - 1) * slowest + pulp.lpSum(steady) + wait
    for s in range(stages):
        model += slowest >= steady[s]
        once = pulp.lpSum(scale * float(once_s[key[1:]]) * y for key, y in arcs.items() if key[0] == s)
        model += wait >= once - pulp.lpSum(steady[:s])
        model += pulp.lpSum(y for key, y in arcs.items() if key[0] == s) == 1
    for s in range(1, stages):
        for i in range(1, layers):
            leaves = pulp.lpSum(y for key, y in arcs.items() if key[:2] == (s, i))
            enters = pulp.lpSum(y for key, y in arcs.items() if key[0] == s - 1 and key[2] == i)
            model += leaves == enters
    model.solve(pulp.HiGHS(msg=False, timeLimit=time_limit_s, gapRel=1e-6))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    chosen = sorted(key for key, y in arcs.items() if (y.value() or 0.0) > 0.5)
    bounds = (0, *(end for _, _, end in chosen))
    times = [float(steady_s[key]) for key in chosen]
    waits = [float(once_s[key[1:]]) - sum(times[:s]) for s, key in enumerate(chosen)]
    return Cut((num_microbatches - 1) * max(times) + sum(times) + max(0.0, *waits), bounds)


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of least objective among the NUM_PROGRAMS most promising configurations."""
    rough = choices_over(problem, limits, _REACH, _balanced)
    promising = sorted(rough, key=lambda choice: choice.value)[:NUM_PROGRAMS]
    choices: list[Choice] = []
    for choice in promising:
        if limits.reached() is not None:
            break
        table = StageTable(problem, choice.candidate)
        choices += [Choice(value, choice.candidate, partition) for value, partition in _solve_one(table)]
    return choices_outcome(problem, limits, [*choices, *([] if choices else rough)], PLANNER.name)


def _balanced(table: StageTable) -> Iterator[tuple[float, Partition]]:
    """Yield the objective of the partition whose slowest stage is fastest, with one level a stage."""
    cost = table.with_uniform_levels(table.time_s)
    found = least_bottleneck(cost, table.num_ranks)
    partition = None if found is None else table.fitted(found.bounds)
    if found is not None and partition is not None:
        times = [float(cost[stage][first, end]) for stage, (first, end) in enumerate(pairwise(found.bounds))]
        once = float(table.step_s[found.bounds[0], found.bounds[1]])
        yield (table.num_microbatches - 1) * max(times) + sum(times) + once, partition


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    steady = table.with_least_recompute(table.time_s, slack=SLACK)
    if steady is None:
        return
    balanced = least_bottleneck(steady, table.num_ranks)
    if balanced is None:
        return
    steady = np.where(steady <= SLACK * balanced.value, steady, np.inf)
    found = inter_stage(steady, table.step_s, table.num_microbatches)
    if found is not None:
        partition = table.fitted(found.bounds)
        assert partition is not None
        yield found.value, partition


_REACH = Reach(tensor=True, zero=(0, 1, 2, 3), axis_orders=True)

PLANNER = NamedPlanner(
    "mist",
    "Zhu et al., Mist: Efficient Distributed Training of Large Language Models via Memory-Parallelism Co-Optimization, "
    "EuroSys 2025",
    solve,
    objective="(G - 1) max t + sum t + exposed d, seconds",
)
