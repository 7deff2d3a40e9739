"""Client: the service's REST interface as methods.

Errors of the service become this package's own: a document or argument it refuses is InvalidDocument or
InvalidArgument with the field, everything else (no connection, keys, a full queue, a defect) is RemoteError.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from stagewright.client.resources import PlanPage, RemotePlan, RemoteProblem, SimulationReport, ValidationReport
from stagewright.planner.documents import Cluster, ModelProfile, Plan
from stagewright.planner.documents.outcome import PlanOutcome, Progress
from stagewright.planner.documents.request import PlanRequest
from stagewright.planner.errors import InvalidArgument, InvalidDocument, NoIncumbent, RemoteError, StagewrightError

Model = str | ModelProfile | Mapping[str, object]
Query = Mapping[str, str | int | float | list[str]]
A = TypeVar("A", bound=BaseModel)

_LONG_POLL_S = 30.0
_BUSY_TRIES = 5


class Client:
    """Talks to one service; use it as a context manager, or close it."""

    def __init__(
        self,
        server: str,
        *,
        key: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._server = server.rstrip("/")
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._timeout_s = timeout_s
        try:
            self._http = httpx.Client(base_url=self._server, headers=headers, timeout=timeout_s, transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise InvalidArgument(f"{server!r} is no URL", field="server", hint="http://host:port") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, request: PlanRequest, *, wait_s: float = 0.0, use_cache: bool = True) -> RemotePlan:
        """Ask for a plan and return its resource, final when it was done within `wait_s`."""
        headers = {"Content-Type": "application/json"}
        if wait_s > 0:
            headers["Prefer"] = f"wait={int(wait_s) or 1}"
        if not use_cache:
            headers["Cache-Control"] = "no-cache"
        response = self._send("POST", "/v1/plans", content=request.canonical_json(), headers=headers, wait_s=wait_s)
        return self._read(response, RemotePlan)

    def get(self, plan_id: str, *, wait_s: float = 0.0) -> RemotePlan:
        """Return a plan, after `wait_s` at most when it is not final before."""
        query = {"wait": wait_s} if wait_s else {}
        return self._read(self._send("GET", f"/v1/plans/{plan_id}", query=query, wait_s=wait_s), RemotePlan)

    def list(
        self,
        *,
        state: str | None = None,
        model: str | None = None,
        cluster: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> PlanPage:
        """Return a page of plans, newest first; `after` is the `next_cursor` of the page before."""
        given = {"status": state, "model": model, "cluster": cluster, "after": after}
        query: dict[str, str | int | float | list[str]] = {
            key: value for key, value in given.items() if value is not None
        }
        query |= {"limit": limit, "label": [f"{name}={value}" for name, value in (labels or {}).items()]}
        return self._read(self._send("GET", "/v1/plans", query=query), PlanPage)

    def cancel(self, plan_id: str, mode: Literal["incumbent", "discard"] = "incumbent") -> RemotePlan:
        """Stop a plan, keeping its best so far or nothing."""
        return self._read(self._send("POST", f"/v1/plans/{plan_id}/cancel", json={"mode": mode}), RemotePlan)

    def plan(
        self,
        request: PlanRequest,
        *,
        progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        poll_s: float = 1.0,
    ) -> PlanOutcome:
        """Ask for a plan, wait for it, and return its outcome, as `make_plan` does on this machine.

        Raises NoIncumbent when the deadline or a cancel came before a plan, and RemoteError when the solve failed.
        """
        watched = progress is not None or should_stop is not None
        step_s = poll_s if watched else _LONG_POLL_S
        current = self.submit(request, wait_s=step_s)
        told_to_stop = False
        while not current.is_final:
            if progress is not None and current.progress is not None:
                report = current.progress
                progress(Progress(report.phase, report.done, report.total, report.incumbent_s, report.bound_s))
            if should_stop is not None and not told_to_stop and should_stop():
                told_to_stop = True
                self._cancel_unless_final(current.id)
            current = self.get(current.id, wait_s=step_s)
        return _outcome(current)

    def simulate(self, plan: Plan, model: Model, *, timeline: bool = False) -> SimulationReport:
        """Return the prediction of a plan for a model, with its timeline when asked."""
        body = {"plan": plan.model_dump(mode="json"), "model": _model_json(model), "timeline": timeline}
        return self._read(self._send("POST", "/v1/simulations", json=body), SimulationReport)

    def validate(
        self, plan: Plan, model: Model | None = None, *, cluster: str | Cluster | None = None
    ) -> ValidationReport:
        """Return what is wrong with a plan for a model on a cluster."""
        body: dict[str, object] = {"plan": plan.model_dump(mode="json")}
        if model is not None:
            body["model"] = _model_json(model)
        if cluster is not None:
            body["cluster"] = cluster if isinstance(cluster, str) else cluster.model_dump(mode="json")
        return self._read(self._send("POST", "/v1/validations", json=body), ValidationReport)

    def trace(self, plan_id: str) -> str:
        """Return the Chrome trace of a finished plan, as JSON text."""
        return self._send("GET", f"/v1/plans/{plan_id}/trace").text

    def catalog(self, name: Literal["gpus", "models", "clusters", "schedules"]) -> tuple[dict[str, object], ...]:
        """Return the entries of one of the service's catalogues."""
        return self._read(self._send("GET", f"/v1/catalog/{name}"), _CatalogPage).data

    def _cancel_unless_final(self, plan_id: str) -> None:
        try:
            self.cancel(plan_id)
        except RemoteError:
            if not self.get(plan_id).is_final:
                raise

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        json: object = None,
        content: str | None = None,
        headers: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
    ) -> httpx.Response:
        for attempt in range(_BUSY_TRIES):
            try:
                response = self._http.request(
                    method,
                    path,
                    params=query,
                    json=json,
                    content=content,
                    headers=headers,
                    timeout=self._timeout_s + wait_s,
                )
            except httpx.HTTPError as error:
                raise RemoteError(
                    f"{self._server} did not answer: {error or type(error).__name__}",
                    field="server",
                    hint="is `stagewright serve` running there?",
                ) from error
            if response.status_code != 429 or attempt == _BUSY_TRIES - 1:
                break
            time.sleep(min(_retry_after_s(response), 10.0))
        if response.is_success:
            return response
        raise _error(response)

    def _read(self, response: httpx.Response, kind: type[A]) -> A:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise RemoteError(
                f"{self._server} answered what this version does not understand: {error.errors()[0]['msg']}",
                field="server",
                hint="compare /version of the server with `stagewright --version`",
            ) from error


class _CatalogPage(BaseModel):
    data: tuple[dict[str, object], ...]


def _outcome(plan: RemotePlan) -> PlanOutcome:
    if plan.result is not None:
        return plan.result
    problem = plan.error or RemoteProblem(title="cancelled", detail=f"plan {plan.id} was cancelled")
    if plan.state == "cancelled" or problem.kind == NoIncumbent.kind:
        raise NoIncumbent(problem.detail, hint=problem.hint)
    raise _error_of(problem)


def _model_json(model: Model) -> object:
    return model.model_dump(mode="json") if isinstance(model, ModelProfile) else model


def _error(response: httpx.Response) -> StagewrightError:
    try:
        problem = RemoteProblem.model_validate_json(response.content)
    except ValidationError:
        return RemoteError(f"{response.url} answered {response.status_code} {response.reason_phrase}", field="server")
    return _error_of(problem)


def _error_of(problem: RemoteProblem) -> StagewrightError:
    pointer = problem.errors[0].get("pointer") if problem.errors else None
    field = pointer.strip("/").replace("/", ".") if pointer else None
    kinds: Mapping[str, type[StagewrightError]] = {
        InvalidDocument.kind: InvalidDocument,
        InvalidArgument.kind: InvalidArgument,
        "model-code-refused": InvalidArgument,
        "malformed-json": InvalidDocument,
    }
    kind = kinds.get(problem.kind, RemoteError)
    return kind(problem.detail or problem.title, field=field, hint=problem.hint)


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "1")
    return float(text) if text.isdigit() else 1.0
