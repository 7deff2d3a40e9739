"""Pipeline schedules: the intermediate representation, the families and their registry."""

from stagewright.planner.schedules.action import Action, Kind, parse_action
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy

__all__ = [
    "Action",
    "Kind",
    "Schedule",
    "ScheduleFamily",
    "ScheduleRequest",
    "StageCosts",
    "WeightPolicy",
    "parse_action",
]
