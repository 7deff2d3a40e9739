"""Metis (Um et al., USENIX ATC 2024) on a cluster of equal devices: device groups, data balance, layer balance.

    1  device groups: for each depth, groups of equal size (on mixed clusters, uneven ones); inside a group replicas are
       preferred, and tensor splits are tried only where fewer of them leave nothing that fits
    2  data balance: microbatches in proportion to the groups' speed; equal here
    3  layer balance: the partition whose slowest stage is fastest among those that fit
    cost = (B - 1) max t + sum t + messages + the slowest gradient reduction

O(D L^2) for each group. Nothing is proved: the balance is optimal for the slowest stage, not for the cost, and the
preference for replicas prunes. Recomputation is not a choice; mixed clusters are the joint search's, with uneven layers
(`search.pool_search`) and uneven batch shares (`search.joined_costs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import Choice, choices_outcome, choices_over
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Partition, Problem


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of least cost, with as little tensor parallelism as fits for each depth and microbatch."""
    choices = choices_over(problem, limits, _REACH, _solve_one)
    least: dict[tuple[int, int], int] = {}
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: choice.candidate.configuration.degrees.tp):
        configuration = choice.candidate.configuration
        key = (configuration.num_ranks, configuration.microbatch)
        if least.get(key, configuration.degrees.tp) < configuration.degrees.tp:
            continue
        if problem.fits(choice.candidate, choice.partition):
            least[key] = configuration.degrees.tp
            kept.append(choice)
    return choices_outcome(problem, limits, kept, PLANNER.name)


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    level, ranks = table.levels[0], table.num_ranks
    time_s = table.time_s + table.recompute_s(level)
    held = [np.where(table.fits(level, table.in_flight(stage)), time_s, np.inf) for stage in range(ranks)]
    found = least_bottleneck(np.stack(held), ranks)
    if found is None:
        return
    stages = [float(time_s[first, end]) for first, end in pairwise(found.bounds)]
    messages = 2.0 * float(table.hop_s[list(found.bounds)].sum())
    reduction = max(float(table.reduction_s[first, end]) for first, end in pairwise(found.bounds))
    cost = (table.num_microbatches - 1) * max(stages) + sum(stages) + messages + reduction
    yield cost, table.partition(found.bounds)


_REACH = Reach(tensor=True, axis_orders=True)

PLANNER = NamedPlanner(
    "metis",
    "Um et al., Metis: Fast Automatic Distributed Training on Heterogeneous GPUs, USENIX ATC 2024",
    solve,
    objective="(B - 1) max t + sum t + communication, seconds",
)
