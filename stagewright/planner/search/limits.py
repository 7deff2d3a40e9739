"""When a search stops and whom it tells: gap, deadline, cancel and progress in one frozen record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from stagewright.planner.documents.outcome import Progress
from stagewright.planner.documents.plan import Plan

Termination = Literal["optimal", "gap", "time_limit", "cancelled"]


OPTIMAL_GAP = 1e-6


class KnownStep(Protocol):
    """The least step that any of several searches has found so far: all that they share."""

    def least_s(self) -> float:
        """Return it in seconds; infinite before the first plan."""

    def offer(self, step_s: float) -> None:
        """Tell the others of a plan."""


@dataclass
class LeastStep:
    """The least step found so far, in one process."""

    step_s: float = float("inf")

    def least_s(self) -> float:
        return self.step_s

    def offer(self, step_s: float) -> None:
        self.step_s = min(self.step_s, step_s)


@dataclass(frozen=True)
class Limits:
    """What ends a search.

    Parameters
    ----------
    gap : proved gap at which to stop.
    deadline_s : seconds from `started_s` (of `clock`).
    top : alternatives to return.
    executor : where candidates are solved.
    previous : plan to stay close to.
    known : what searches of other parts of the space have found; None for a search alone.
    """

    gap: float = 0.01
    deadline_s: float | None = None
    started_s: float = 0.0
    top: int = 5
    executor: str = "inline"
    previous: Plan | None = None
    progress: Callable[[Progress], None] | None = None
    should_stop: Callable[[], bool] | None = None
    known: KnownStep | None = None
    clock: Callable[[], float] = time.perf_counter

    def left_s(self) -> float:
        """Return the seconds until the deadline; infinite without one."""
        if self.deadline_s is None:
            return float("inf")
        return self.deadline_s - (self.clock() - self.started_s)

    def reached(self) -> Termination | None:
        """Return what ends the search now: a cancel, the deadline, or nothing."""
        if self.should_stop is not None and self.should_stop():
            return "cancelled"
        return "time_limit" if self.left_s() <= 0 else None

    def report(self, phase: str, done: int, total: int, incumbent_s: float | None, bound_s: float | None) -> None:
        """Tell the listener, if there is one."""
        if self.progress is not None:
            self.progress(Progress(phase, done, total, incumbent_s, bound_s))
