"""What the service answers, as the client reads it: fields it does not know yet are left aside."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Prediction

State = Literal["queued", "running", "succeeded", "infeasible", "failed", "cancelled"]


class Answer(BaseModel):
    """A tolerant, frozen answer."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class RemoteProblem(Answer):
    """An RFC 9457 problem document."""

    type: str = "about:blank"
    title: str = ""
    status: int = 0
    detail: str = ""
    hint: str | None = None
    errors: tuple[dict[str, str], ...] = ()
    request_id: str | None = None

    @property
    def kind(self) -> str:
        """The last part of the type, such as "no-incumbent"."""
        return self.type.rpartition("/")[2]


class RemoteProgress(Answer):
    """How far a running solve is."""

    phase: str
    done: int
    total: int
    incumbent_s: float | None = None
    bound_s: float | None = None
    gap: float | None = None


class RemotePlan(Answer):
    """A plan resource; in a page of plans `result` is left out."""

    id: str
    state: State
    termination: Literal["optimal", "gap", "time_limit", "cancelled"] | None = None
    cached: bool = False
    result: PlanOutcome | None = None
    error: RemoteProblem | None = None
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None
    labels: dict[str, str] = {}
    progress: RemoteProgress | None = None

    @property
    def is_final(self) -> bool:
        """Whether this state is never left."""
        return self.state not in ("queued", "running")


class PlanPage(Answer):
    """One page of plans, newest first."""

    data: tuple[RemotePlan, ...]
    has_more: bool
    next_cursor: str | None = None


class Violation(Answer):
    """One rule that a request or a plan breaks."""

    code: str
    message: str
    pointer: str | None = None
    hint: str | None = None


class ValidationReport(Answer):
    """What is wrong with a request or a plan."""

    valid: bool
    violations: tuple[Violation, ...] = ()


class SimulationReport(Answer):
    """A prediction; `timeline` in columns, as the service documents it, where it was asked for."""

    prediction: Prediction
    timeline: Annotated[dict[str, object] | None, Field(repr=False)] = None
    num_spans: int
    memory_limit_bytes: tuple[float, ...]
