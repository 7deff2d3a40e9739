"""The default planner: the joint search with a certificate (`search.exact`) under any objective (`objectives`).

Where stages may differ, on a mixed cluster or because the job asks for degrees by stage, `search.stage_answer` searches.
"""

from __future__ import annotations

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.objectives.dispatch import solve_objective
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.search import stage_answer
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the best plan of the space that cluster and job declare, with its certificate."""
    if problem.cluster.is_mixed:
        return stage_answer.solve_mixed(problem, limits)
    if problem.job.space.per_stage_degrees:
        return stage_answer.solve_by_stage(problem, limits)
    return solve_objective(problem, limits)


PLANNER = NamedPlanner("exact", "Stagewright: joint search over cuts from simulated critical paths", solve)
