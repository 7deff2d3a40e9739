"""`/v1/plans`: ask, wait, read, cancel, list, follow."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from stagewright.api.auth import may
from stagewright.api.lifecycle import CancelMode, State
from stagewright.api.problems import Problem, problem_of
from stagewright.api.requests import (
    CancelRequest,
    cancel_request,
    cluster_name,
    model_name,
    plan_request,
    read_object,
    request_digest,
)
from stagewright.api.resources import PlanPage, PlanResource, etag, plan_head, plan_json
from stagewright.api.routes.bodies import body_of, problems
from stagewright.api.service import Service
from stagewright.api.store import NewPlan, PlanFilter, PlanRow
from stagewright.planner.documents.request import PlanRequest
from stagewright.planner.errors import StagewrightError

ROUTER = APIRouter(prefix="/v1/plans", tags=["plans"])
_HEARTBEAT_S = 15.0


@ROUTER.post(
    "",
    status_code=202,
    response_model=PlanResource,
    responses={
        201: {"model": PlanResource, "description": "Done within the wait, or known."},
        **problems(413, 422, 429),
    },
    openapi_extra=body_of(PlanRequest),
    dependencies=[Depends(may("plan"))],
)
async def create_plan(request: Request) -> Response:
    """Ask for a plan: 202 with its place, or 201 with the answer when it is known or `Prefer: wait=n` sufficed."""
    service: Service = request.app.state.service
    value = await read_object(request)
    use_cache = "no-cache" not in request.headers.get("cache-control", "").lower()
    row = await run_in_threadpool(_accept, service, value, use_cache)
    headers = {}
    wait_s = _preferred_wait_s(request.headers.get("prefer", ""), service.settings.max_wait_s)
    if not row.state.is_final:
        service.dispatcher.ring()
        if wait_s is not None:
            row = await service.wait_final(row.id, wait_s)
            headers["Preference-Applied"] = f"wait={wait_s:g}"
    status = 201 if row.state.is_final else 202
    return await _plan_response(service, row, status=status, headers=headers)


@ROUTER.get("", response_model=PlanPage, dependencies=[Depends(may("read"))])
def list_plans(
    request: Request,
    state: Annotated[State | None, Query(alias="status", description="queued, running, succeeded ...")] = None,
    model: str | None = None,
    cluster: str | None = None,
    label: Annotated[list[str] | None, Query(description="name=value, repeatable")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[str | None, Query(description="next_cursor of the page before")] = None,
) -> Response:
    """List plans, newest first, without their results."""
    service: Service = request.app.state.service
    labels = [_label(text) for text in label or ()]
    before_seq = None if after is None else _parse_cursor(after)
    rows, has_more = service.store.page(PlanFilter(state, model, cluster, labels), limit=limit, before_seq=before_seq)
    cursor = _cursor(rows[-1].seq) if has_more else None
    page = {"data": [plan_head(row) for row in rows], "has_more": has_more, "next_cursor": cursor}
    headers = {}
    if cursor is not None:
        query = [(name, value) for name, value in request.query_params.multi_items() if name != "after"]
        headers["Link"] = f'</v1/plans?{urlencode([*query, ("after", cursor)])}>; rel="next"'
    return Response(json.dumps(page, ensure_ascii=False), headers=headers, media_type="application/json")


@ROUTER.get("/{plan_id}", response_model=PlanResource, responses=problems(404), dependencies=[Depends(may("read"))])
async def read_plan(
    request: Request,
    plan_id: str,
    wait: Annotated[float, Query(ge=0, description="hold the answer up to so many seconds until it is final")] = 0.0,
) -> Response:
    """Return a plan; `wait` polls long, and `If-None-Match` answers 304 while nothing changed."""
    service: Service = request.app.state.service
    row = await service.wait_final(plan_id, min(wait, service.settings.max_wait_s))
    return await _plan_response(service, row, status=200, known=request.headers.get("if-none-match", ""))


@ROUTER.get("/{plan_id}/request", responses=problems(404), dependencies=[Depends(may("read"))])
def read_request(request: Request, plan_id: str) -> Response:
    """Return the question as it was accepted."""
    service: Service = request.app.state.service
    return Response(service.plan(plan_id).request, media_type="application/json")


@ROUTER.post(
    "/{plan_id}/cancel",
    status_code=202,
    response_model=PlanResource,
    responses=problems(404, 409),
    openapi_extra=body_of(CancelRequest, required=False),
    dependencies=[Depends(may("plan"))],
)
async def cancel_plan(request: Request, plan_id: str) -> Response:
    """Stop a plan: `incumbent` keeps the best so far, `discard` keeps nothing."""
    service: Service = request.app.state.service
    mode: CancelMode = (
        "discard" if cancel_request(await read_object(request, empty_is={})).mode == "discard" else "incumbent"
    )
    row = await run_in_threadpool(service.plan, plan_id)
    changed = await run_in_threadpool(service.store.request_cancel, row, mode)
    if changed is None:
        row = await run_in_threadpool(service.plan, plan_id)
        raise Problem("already-final", f"plan {plan_id} has {row.state.value}")
    service.dispatcher.nudge(plan_id)
    service.changes.note(plan_id)
    return await _plan_response(service, changed, status=202)


@ROUTER.get("/{plan_id}/events", responses=problems(404), dependencies=[Depends(may("read"))])
async def follow_plan(request: Request, plan_id: str) -> Response:
    """Follow a plan as server-sent events: `state` at each change of state, `progress` between; ends when final."""
    service: Service = request.app.state.service
    row = await run_in_threadpool(service.plan, plan_id)
    last = request.headers.get("last-event-id", "")
    seen = int(last) if re.fullmatch(r"\d{1,9}", last) else 0
    if row.state.is_final and row.version <= seen:
        return Response(status_code=204)  # tells an EventSource not to come back
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(service, row, seen), headers=headers, media_type="text/event-stream")


async def _events(service: Service, row: PlanRow, seen: int) -> AsyncIterator[str]:
    state: State | None = None
    with service.changes.watch(row.id) as watch:
        waited_s = 0.0
        while True:
            row = await run_in_threadpool(service.plan, row.id)
            if row.version > seen:
                event = "state" if row.state is not state else "progress"
                state, seen, waited_s = row.state, row.version, 0.0
                yield f"id: {row.version}\nevent: {event}\ndata: {json.dumps(plan_head(row))}\n\n"
            if row.state.is_final:
                return
            await watch.changed(1.0)
            waited_s += 1.0
            if waited_s >= _HEARTBEAT_S:
                waited_s = 0.0
                yield ": still here\n\n"


def _accept(service: Service, value: Mapping[str, object], use_cache: bool) -> PlanRow:
    request = plan_request(value)
    try:
        service.backend.check(request)
    except StagewrightError as error:
        raise problem_of(error) from error
    deadline_s = _deadline_s(service, request)
    if service.store.num_queued() >= service.settings.max_queued:
        raise Problem("queue-full", f"{service.settings.max_queued} plans wait already", headers={"Retry-After": "5"})
    new = NewPlan(
        request=request.canonical_json(),
        request_digest=request_digest(request, service.backend.versions),
        model=model_name(request.model),
        cluster=cluster_name(request.cluster),
        labels=request.labels,
        deadline_s=deadline_s,
    )
    return service.store.accept(new, use_cache=use_cache)


def _deadline_s(service: Service, request: PlanRequest) -> float:
    settings = service.settings
    asked = request.deadline_s or request.job.deadline_s or settings.default_deadline_s
    if asked > settings.max_deadline_s:
        detail = f"deadline_s is {asked:g}, this server allows {settings.max_deadline_s:g}"
        raise Problem("invalid-argument", detail, errors=[{"pointer": "/deadline_s", "detail": detail}])
    return asked


async def _plan_response(
    service: Service, row: PlanRow, *, status: int, headers: dict[str, str] | None = None, known: str = ""
) -> Response:
    outcome = None
    if row.outcome_digest is not None:
        outcome = await run_in_threadpool(service.store.outcome_json, row.outcome_digest)
    body = plan_json(row, outcome)
    tag = etag(body)
    sent = {"ETag": tag, "Cache-Control": "private, no-cache", **(headers or {})}
    if status != 200:
        sent["Location"] = f"/v1/plans/{row.id}"
    if not row.state.is_final:
        sent["Retry-After"] = "1"
    if status == 200 and (known.strip() == "*" or tag in [part.strip() for part in known.split(",")]):
        return Response(status_code=304, headers=sent)
    return Response(body, status, sent, media_type="application/json")


def _preferred_wait_s(prefer: str, longest_s: float) -> float | None:
    match = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?", prefer)
    return None if match is None else min(float(match.group(1)), longest_s)


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Problem("invalid-argument", f"label {text[:80]!r} does not read name=value")
    return name, value


def _cursor(seq: int) -> str:
    return base64.urlsafe_b64encode(f"s{seq}".encode()).decode().rstrip("=")


def _parse_cursor(text: str) -> int:
    try:
        decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii")
        if re.fullmatch(r"s\d{1,18}", decoded):
            return int(decoded[1:])
    except (ValueError, binascii.Error):
        pass
    raise Problem("invalid-argument", f"after {text[:80]!r} is no cursor", hint="take next_cursor of the page before")
