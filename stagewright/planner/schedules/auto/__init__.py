"""The `auto` schedule: search over orders and placements with a proved lower bound."""

from stagewright.planner.schedules.auto.bound import any_order_bound
from stagewright.planner.schedules.auto.request import AutoRequest, AutoResult, Effort, Gain, PlacementChoice, Stop
from stagewright.planner.schedules.auto.search import search

__all__ = [
    "AutoRequest",
    "AutoResult",
    "Effort",
    "Gain",
    "PlacementChoice",
    "Stop",
    "any_order_bound",
    "search",
]
