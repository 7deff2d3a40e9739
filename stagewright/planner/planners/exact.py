"""The default planner: the joint search with a certificate (`search.exact`) under any objective (`objectives`)."""

from __future__ import annotations

from stagewright.planner.objectives.dispatch import solve_objective
from stagewright.planner.planners.registry import NamedPlanner

PLANNER = NamedPlanner("exact", "Stagewright: joint search over cuts from simulated critical paths", solve_objective)
