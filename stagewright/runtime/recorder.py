"""Recording what a rank did and when, on the clock that all processes of a node share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from stagewright.planner.schedules.action import Action

Row = tuple[int, int, int, int, int, int, int, float, float]


def now_s() -> float:
    """Return the time on a clock that processes of one node share."""
    return time.monotonic()


@dataclass
class Recorder:
    """Spans of one iteration: (lane, KIND, REPLICA, STAGE, MICROBATCH, SLICE, FUSED, start, end).

    `clock` is read before and after each action.
    """

    rows: list[Row] = field(default_factory=list)
    clock: Callable[[], float] = now_s

    def add(self, lane: int, action: Action, start_s: float, end_s: float) -> None:
        """Add one span."""
        self.rows.append(
            (lane, int(action.kind), action.replica, action.stage, action.microbatch, action.slice, 0, start_s, end_s)
        )

    def clear(self) -> None:
        """Forget the spans of the iteration before."""
        self.rows.clear()
