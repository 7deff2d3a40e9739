"""The one protocol of executors, and the executors by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.executors.part import Part


class Executor(Protocol):
    """Runs the parts of a search, which share nothing but the least step that any of them has found."""

    def run(self, parts: Sequence[Part], should_stop: Callable[[], bool]) -> Iterator[tuple[int, PlanOutcome]]:
        """Yield (place, outcome) of each part as it ends; when `should_stop` is true, parts end with what they have."""


NAMES = ("inline", "process", "ray")


def executor(name: str) -> Executor:
    """Return an executor by name; raises InvalidArgument for an unknown one, or one whose package is missing."""
    if name == "inline":
        from stagewright.planner.executors.inline import InlineExecutor

        return InlineExecutor()
    if name == "process":
        from stagewright.planner.executors.process import ProcessExecutor

        return ProcessExecutor()
    if name == "ray":
        from stagewright.planner.executors.ray_cluster import RayExecutor

        return RayExecutor()
    raise InvalidArgument(f"there is no executor {name!r}", field="executor", hint="known: " + ", ".join(NAMES))
