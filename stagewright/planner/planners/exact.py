"""The default planner: the joint search with a certificate (`search.exact`) under any objective (`objectives`).

Where stages may differ, on a mixed cluster or because the job asks for degrees by stage, and where layers are tied to one
stage, `search.stage_answer` searches.
"""

from __future__ import annotations

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.objectives.dispatch import solve_objective
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.search import stage_answer
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import STAGE_GRAPH_FAMILIES
from stagewright.planner.search.stage_graph import has_branches


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the best plan of the space that cluster and job declare, with its certificate."""
    if problem.cluster.is_mixed:
        return stage_answer.solve_mixed(problem, limits)
    by_step_time = problem.job.objective == "step-time" and problem.job.step_deadline_s is None
    branches = has_branches(problem.profile)
    _refuse_graph_of_chain(problem, branches)
    if problem.job.space.ties:
        return stage_answer.solve_tied(problem, limits)
    if problem.job.space.per_stage_degrees or (by_step_time and branches):
        return stage_answer.solve_by_stage(problem, limits)
    return solve_objective(problem, limits)


def _refuse_graph_of_chain(problem: Problem, branches: bool) -> None:
    space = problem.job.space
    named = next((name for name in STAGE_GRAPH_FAMILIES if name in (*space.schedules, space.pins.schedule)), None)
    if not branches and named is not None:
        raise InvalidArgument(
            f"{named} runs branches side by side, {problem.profile.name} has none",
            field="space.schedules",
            hint=f"on a chain of stages it is {'gpipe' if named == 'distmm' else '1f1b'}",
        )


PLANNER = NamedPlanner(
    "exact", "Stagewright: joint search over cuts from simulated critical paths", solve, by_stage=True
)
