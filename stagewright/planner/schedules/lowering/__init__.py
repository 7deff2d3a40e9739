"""Passes from compute-only orders to what a runtime executes."""

from stagewright.planner.schedules.lowering.lower import lower
from stagewright.planner.schedules.lowering.merge import merge_backwards

__all__ = ["lower", "merge_backwards"]
