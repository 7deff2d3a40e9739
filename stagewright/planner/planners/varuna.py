"""Varuna's configuration search (Athlur et al., EuroSys 2022): one microbatch, every depth, balanced cuts, simulated.

    1  m = the knee of F(m) / m: the smallest microbatch within KNEE of the best time per sample
    2  for each depth P: D = floor(G / P) replicas, cut-points that balance the stages' compute
    3  simulate P stages and D replicas with the calibrated costs; keep the fastest

Cut-points balance the largest stage exactly, O(P L^2), once a depth; one simulation a depth. Recomputation is on, as in
Varuna, wherever the job allows it. Optimal over balanced (P, D) with that one microbatch, and only by its simulator,
which here is the common one; memory is checked by what the simulator reports. Varuna runs ready backwards and forwards
out of their fixed order (`schedules.varuna`, which `stagewright schedule varuna` simulates); plans here run 1F1B.
"""

from __future__ import annotations

from collections.abc import Iterator

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach, configurations
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import candidates_outcome, choices_over
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Partition, Problem

KNEE = 1.05


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the fastest balanced plan at the knee's microbatch."""
    microbatch = knee(forward_by_microbatch(problem))
    choices = [
        (choice.candidate, choice.partition)
        for choice in choices_over(problem, limits, _REACH, _solve_one)
        if choice.candidate.configuration.microbatch == microbatch
    ]
    return candidates_outcome(problem, limits, choices, PLANNER.name)


def forward_by_microbatch(problem: Problem) -> dict[int, float]:
    """Return the forward seconds of the whole model for each microbatch of the problem."""
    seconds: dict[int, float] = {}
    for configuration in configurations(problem, _REACH):
        if configuration.microbatch not in seconds:
            seconds[configuration.microbatch] = float(problem.costs(configuration).forward_s.sum())
    return seconds


def knee(forward_s: dict[int, float]) -> int:
    """Return the smallest microbatch m whose F(m) / m is within KNEE of the least."""
    least = min(seconds / size for size, seconds in forward_s.items())
    return min(size for size, seconds in forward_s.items() if seconds / size <= KNEE * least)


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    level = table.levels[-1]
    found = least_bottleneck(table.time_s + table.recompute_s(level), table.num_ranks)
    if found is not None:
        yield found.value, table.partition(found.bounds, level)


_REACH = Reach(devices="any")

PLANNER = NamedPlanner(
    "varuna",
    "Athlur et al., Varuna: Scalable, Low-cost Training of Massive Deep Learning Models, EuroSys 2022",
    solve,
    objective="simulated seconds of balanced plans",
)
