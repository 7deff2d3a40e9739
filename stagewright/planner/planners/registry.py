"""Every named planner: who published it, and the function that solves a problem its way.

A planner answers with a PlanOutcome whose plans the common simulator has scored; what the planner itself optimised is
its own objective. `candidates_outcome` in `planners.scoring` makes that outcome from bare choices.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem

Solve = Callable[[Problem, Limits], PlanOutcome]


@dataclass(frozen=True)
class NamedPlanner:
    """One row of the registry.

    Parameters
    ----------
    name, aliases : what users type.
    paper : authors, title, venue.
    solve : from a problem and its limits to an outcome.
    objective : what the planner itself minimises, in words.
    by_stage : whether it answers jobs whose stages may differ in their degrees.
    """

    name: str
    paper: str
    solve: Solve
    objective: str = "simulated step time"
    aliases: tuple[str, ...] = ()
    by_stage: bool = False


MODULES = (
    "exact",
    "exhaustive",
    "megatron",
    "random",
    "aceso",
    "adapipe",
    "alpa",
    "autopipe",
    "dapple",
    "device_placement",
    "efftra",
    "flexflow",
    "galvatron",
    "hypar",
    "mcap",
    "metis",
    "mist",
    "optcnn",
    "pipedream",
    "pipedream_2bw",
    "piper",
    "tarnawski_dp",
    "tarnawski_ip",
    "tensoropt",
    "tofu",
    "torchgpipe",
    "varuna",
    "vpipe",
)


def planners() -> tuple[NamedPlanner, ...]:
    """Return all planners, the exact one first; their modules are imported here, since they import this one."""
    return tuple(import_module(f"{__package__}.{name}").PLANNER for name in MODULES)


def planner(name: str) -> NamedPlanner:
    """Return the planner of a name or alias; raises InvalidArgument with the nearest name."""
    wanted = name.strip().lower().replace("_", "-")
    by_name = {known: row for row in planners() for known in (row.name, *row.aliases)}
    if wanted in by_name:
        return by_name[wanted]
    nearest = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.4)
    raise InvalidArgument(
        f"there is no planner {name!r}",
        field="planner",
        hint=(f"did you mean {nearest[0]}? " if nearest else "")
        + "known: "
        + ", ".join(row.name for row in planners()),
    )
