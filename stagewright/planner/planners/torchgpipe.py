"""torchgpipe's balance (Kim et al., 2020): contiguous blocks of least maximum cost, then GPipe over all devices.

torchgpipe balances by time with the block partition of Barany and Grinberg, which may miss the optimum; the same
objective, the largest block, is minimised exactly here by the linear programme over cuts, O(D L^2).

The planner does not choose how many replicas or microbatches there are. Its rules: as deep a pipeline as the devices and
layers allow, checkpointing on (every layer recomputes, as its default `except_last` nearly does), and the largest
microbatch that leaves four microbatches a device (Huang et al., 2019: the bubble is negligible from there on). Nothing is
said about memory or communication.
"""

from __future__ import annotations

from collections.abc import Iterator

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import Choice, choices_outcome, choices_over
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Partition, Problem

FILLED = 4


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the deepest pipeline with balanced blocks."""
    choices = choices_over(problem, limits, _REACH, _solve_one)
    ordered = sorted(choices, key=_preference)
    return choices_outcome(problem, limits, ordered, PLANNER.name, in_order=True)


def _preference(choice: Choice) -> tuple[int, bool, int]:
    """Order by depth, then by whether the pipeline is filled, then by microbatch."""
    configuration = choice.candidate.configuration
    filled = configuration.num_microbatches >= FILLED * configuration.num_ranks
    return (-configuration.num_ranks, not filled, -configuration.microbatch if filled else configuration.microbatch)


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    found = least_bottleneck(table.time_s, table.num_ranks)
    if found is not None:
        yield found.value, table.partition(found.bounds, table.levels[-1])


_REACH = Reach(schedule="gpipe")

PLANNER = NamedPlanner(
    "torchgpipe",
    "Kim et al., torchgpipe: On-the-fly Pipeline Parallelism for Training Giant Models, 2020",
    solve,
    objective="seconds of the largest block",
)
