"""What a solver process is given and what it sends back: plain data, sent through a pipe of its own.

A task is a module-level function with a text (JSON) as its argument. It gets a TaskContext to report progress, to ask
whether it should stop, and to know how long it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from stagewright.planner.documents.outcome import Progress


class TaskContext(Protocol):
    """What a task may do besides computing."""

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; 0 after it."""
        ...

    def report(self, progress: Progress) -> None:
        """Tell the server how far the task is."""
        ...

    def should_stop(self) -> bool:
        """Return True once the server asked the task to stop or the deadline passed; cheap enough to ask often."""
        ...


TaskFunction = Callable[[str, TaskContext], str]


@dataclass(frozen=True)
class Task:
    """To the process: call `function` with `argument`."""

    function: TaskFunction
    argument: str
    deadline_s: float


@dataclass(frozen=True)
class Stop:
    """To the process: end the task with what it has."""


@dataclass(frozen=True)
class Ready:
    """From the process: it is prepared."""


@dataclass(frozen=True)
class Answer:
    """From the process: what the function returned."""

    text: str


@dataclass(frozen=True)
class Refusal:
    """From the process: the function raised. `kind` is a StagewrightError's, or "internal" with the traceback."""

    kind: str
    message: str
    field: str | None = None
    hint: str | None = None
    traceback: str = ""


Reply = Ready | Progress | Answer | Refusal
