"""The plan resource: a row of the store as the wire shows it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from stagewright.api.lifecycle import Failure, State, Termination
from stagewright.api.problems import KINDS, Problem, pointer_of
from stagewright.api.store import PlanRow
from stagewright.planner.documents.outcome import PlanOutcome


class ProblemDocument(BaseModel):
    """RFC 9457, with JSON Pointers into the request body."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    hint: str | None = None
    errors: list[dict[str, str]] = []
    request_id: str | None = None


class ProgressReport(BaseModel):
    """How far a running solve is, and the best it knows."""

    phase: str
    done: int
    total: int
    incumbent_s: float | None
    bound_s: float | None
    gap: float | None


class PlanResource(BaseModel):
    """A plan from acceptance to its final state; `result` is the document of `stagewright plan --json`."""

    id: str
    state: State
    termination: Termination | None
    cached: bool
    result: PlanOutcome | None
    error: ProblemDocument | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    labels: dict[str, str]
    model: str
    cluster: str
    deadline_s: float
    attempt: int
    progress: ProgressReport | None
    cancel_requested: Literal["incumbent", "discard"] | None


class PlanPage(BaseModel):
    """One page of plans, newest first; they stand without `result`."""

    data: list[dict[str, object]]
    has_more: bool
    next_cursor: str | None


class Violation(BaseModel):
    """One rule that a request or a plan breaks."""

    code: str
    message: str
    pointer: str | None = None
    hint: str | None = None


class ValidationReport(BaseModel):
    """What is wrong with a request or a plan; `summary` says what a valid request asks for."""

    valid: bool
    violations: list[Violation]
    summary: dict[str, object] | None = None


class Spans(BaseModel):
    """A timeline in columns; `kind` and `lane` are indices into `kinds` and `lanes`, times are seconds."""

    source: Literal["simulated", "measured"]
    num_ranks: int
    makespan_s: float
    lanes: list[str]
    kinds: list[str]
    rank: list[int]
    lane: list[int]
    kind: list[int]
    stage: list[int]
    microbatch: list[int]
    slice: list[int]
    replica: list[int]
    start_s: list[float]
    end_s: list[float]
    memory_time_s: list[list[float]]
    memory_bytes: list[list[float]]
    critical_path: list[int]


class SimulationReport(BaseModel):
    """The prediction again, and the timeline where it was asked for and is not too long."""

    prediction: dict[str, object]
    timeline: Spans | None
    num_spans: int
    memory_limit_bytes: Annotated[list[float], Field(description="of one device of each pipeline rank")]


def plan_head(row: PlanRow) -> dict[str, object]:
    """Return the plan resource without `result`."""
    return {
        "id": row.id,
        "state": row.state.value,
        "termination": row.termination,
        "cached": row.cached,
        "error": None if row.failure is None else failure_document(row.failure, f"/v1/plans/{row.id}"),
        "created_at": timestamp(row.created_at),
        "started_at": timestamp(row.started_at),
        "finished_at": timestamp(row.finished_at),
        "labels": dict(row.labels),
        "model": row.model,
        "cluster": row.cluster,
        "deadline_s": row.deadline_s,
        "attempt": row.attempt,
        "progress": None if row.progress is None else asdict(row.progress) | {"gap": row.progress.gap},
        "cancel_requested": None if row.state.is_final else row.cancel_mode,
    }


def plan_json(row: PlanRow, outcome_json: str | None) -> bytes:
    """Return the plan resource; the outcome is put in as it is stored, since it can be large."""
    head = json.dumps(plan_head(row), ensure_ascii=False, separators=(",", ":"))
    return f'{head[:-1]},"result":{outcome_json or "null"}}}'.encode()


def etag(body: bytes) -> str:
    """Return the strong entity tag of a body."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def failure_document(failure: Failure, instance: str) -> dict[str, object]:
    """Return the problem document of a plan that failed."""
    kind = failure.kind if failure.kind in KINDS else "invalid-argument"
    errors = [{"pointer": pointer_of(failure.field), "detail": failure.message}] if failure.field else []
    return Problem(kind, failure.message, hint=failure.hint, errors=errors).document(instance=instance)


def timestamp(seconds: float | None) -> str | None:
    """Return seconds since 1970 as RFC 3339 text in UTC."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
