"""The life of an accepted plan: its states, and how a solve's end becomes a final state. Pure: no clock, no I/O.

    queued -> running -> succeeded | infeasible | failed | cancelled
       ^         |
       +---------+   the process or the server died: the solve runs again

A final state is never left.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from stagewright.planner.documents.outcome import PlanOutcome

Termination = Literal["optimal", "gap", "time_limit", "cancelled"]
CancelMode = Literal["incumbent", "discard"]
StopReason = Literal["incumbent", "discard", "deadline"]


class State(StrEnum):
    """Where a plan stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    INFEASIBLE = "infeasible"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


@dataclass(frozen=True)
class Failure:
    """Why a plan failed: the kind of a problem (problems.py) with its message."""

    kind: str
    message: str
    field: str | None = None
    hint: str | None = None


@dataclass(frozen=True)
class Ending:
    """A final state with what belongs to it."""

    state: State
    termination: Termination | None = None
    outcome: PlanOutcome | None = None
    failure: Failure | None = None

    def __post_init__(self) -> None:
        assert self.state.is_final, self.state


def answered(outcome: PlanOutcome, stop: StopReason | None) -> Ending:
    """Return the ending of a solve that answered, perhaps after it was asked to stop."""
    if stop == "discard":
        return Ending(State.CANCELLED, "cancelled")
    if outcome.status == "infeasible":
        return Ending(State.INFEASIBLE, None, outcome)
    if outcome.status == "no_solution" or outcome.plan is None:
        return stopped_empty(stop, outcome)
    return Ending(State.SUCCEEDED, _termination(outcome, stop), outcome)


def stopped_empty(stop: StopReason | None, outcome: PlanOutcome | None = None) -> Ending:
    """Return the ending of a solve that was stopped before it had a plan."""
    if stop in ("incumbent", "discard"):
        return Ending(State.CANCELLED, "cancelled")
    failure = Failure(
        "no-incumbent",
        "the deadline came before the first plan that fits was found",
        hint="give a longer deadline_s, or pin a degree to make the space smaller",
    )
    return Ending(State.FAILED, "time_limit", outcome, failure)


def _termination(outcome: PlanOutcome, stop: StopReason | None) -> Termination:
    if outcome.status == "optimal":
        return "optimal"
    if outcome.status == "within_gap":
        return "gap"
    return "cancelled" if stop == "incumbent" else "time_limit"
