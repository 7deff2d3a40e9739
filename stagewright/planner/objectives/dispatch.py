"""From a job's objective to its solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.objectives.fewest_devices import solve_fewest_devices
from stagewright.planner.objectives.frontier import solve_frontier
from stagewright.planner.objectives.min_max_memory import solve_min_max_memory
from stagewright.planner.objectives.step_time import solve_step_time
from stagewright.planner.objectives.tokens_per_dollar import solve_tokens_per_dollar
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem

SOLVERS: Mapping[str, Callable[[Problem, Limits], PlanOutcome]] = {
    "step-time": solve_step_time,
    "tokens-per-dollar": solve_tokens_per_dollar,
    "fewest-devices": solve_fewest_devices,
    "min-max-memory": solve_min_max_memory,
    "frontier": solve_frontier,
}


def solve_objective(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the best plan under the job's objective, with what was proved of it."""
    return SOLVERS[problem.job.objective](problem, limits)
