"""The default planner: the joint search with a certificate (`search.exact`)."""

from __future__ import annotations

from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.search.exact import solve

PLANNER = NamedPlanner("exact", "Stagewright: joint search over cuts from simulated critical paths", solve)
