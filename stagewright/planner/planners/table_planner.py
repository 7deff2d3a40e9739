"""A named planner that solves each configuration by itself and takes the best by its own objective."""

from __future__ import annotations

from collections.abc import Callable

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import SolveOne, choices_outcome, choices_over
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem


def table_planner(
    name: str,
    paper: str,
    solve_one: SolveOne,
    *,
    reach: Reach,
    objective: str,
    lower_bound: Callable[[StageTable], float] | None = None,
    aliases: tuple[str, ...] = (),
) -> NamedPlanner:
    """Return the planner that runs `solve_one` on every configuration within reach."""

    def solve(problem: Problem, limits: Limits) -> PlanOutcome:
        choices = choices_over(problem, limits, reach, solve_one, lower_bound=lower_bound)
        return choices_outcome(problem, limits, choices, name)

    return NamedPlanner(name, paper, solve, objective=objective, aliases=aliases)
