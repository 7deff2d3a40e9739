"""`/v1/simulations`, `/v1/validations` and a plan's trace: short questions, answered at once."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from stagewright.api.auth import may
from stagewright.api.problems import Problem
from stagewright.api.requests import SimulationRequest, ValidationRequest, read_object, simulation_request
from stagewright.api.resources import SimulationReport, Spans, ValidationReport
from stagewright.api.routes.bodies import body_of, problems
from stagewright.api.service import Service
from stagewright.api.timeline_columns import timeline_of
from stagewright.planner.documents.document import canonical_json

ROUTER = APIRouter(tags=["simulations"])


@ROUTER.post(
    "/v1/simulations",
    response_model=SimulationReport,
    responses=problems(413, 422, 503),
    openapi_extra=body_of(SimulationRequest),
    dependencies=[Depends(may("plan"))],
)
async def simulate(request: Request) -> Response:
    """Simulate a plan: step time, memory, bubble, and the timeline unless `timeline` is false."""
    service: Service = request.app.state.service
    value = await read_object(request)
    question = await run_in_threadpool(simulation_request, value)
    answer = await run_in_threadpool(service.desk.answer, service.backend.simulate, question.canonical_json())
    return Response(answer, media_type="application/json")


@ROUTER.post(
    "/v1/validations",
    response_model=ValidationReport,
    responses=problems(413, 422, 503),
    openapi_extra=body_of(ValidationRequest),
    dependencies=[Depends(may("read"))],
)
async def validate(request: Request) -> Response:
    """Say what is wrong with a planning request or a plan; a wrong one is an answer, not an error."""
    service: Service = request.app.state.service
    value = await read_object(request)
    if ("request" in value) == ("plan" in value):
        raise Problem("invalid-document", "give either request or plan", hint="with a plan, give its model too")
    if "request" in value:
        report = await run_in_threadpool(service.backend.review, value["request"])
        return Response(report.model_dump_json(), media_type="application/json")
    answer = await run_in_threadpool(service.desk.answer, service.backend.validate, canonical_json(value))
    return Response(answer, media_type="application/json")


@ROUTER.get(
    "/v1/plans/{plan_id}/trace",
    responses=problems(404, 503),
    dependencies=[Depends(may("read"))],
)
async def trace(
    request: Request,
    plan_id: str,
    alternative: Annotated[
        int | None, Query(ge=0, description="the runner-up at this place; the plan itself unless told")
    ] = None,
) -> Response:
    """Return the plan's simulated timeline in the Chrome trace format, which Perfetto opens."""
    service: Service = request.app.state.service
    row = await run_in_threadpool(service.plan, plan_id)
    plan = None
    if row.outcome_digest is not None:
        outcome = json.loads(await run_in_threadpool(service.store.outcome_json, row.outcome_digest))
        plans = [entry["plan"] for entry in outcome["alternatives"]]
        if alternative is not None and alternative >= len(plans):
            raise Problem("not-found", f"plan {plan_id} has {len(plans)} alternatives, {alternative} is not one")
        plan = outcome["plan"] if alternative is None else plans[alternative]
    if plan is None:
        raise Problem("not-found", f"plan {plan_id} is {row.state.value} and has no plan to trace")
    question = canonical_json({"plan": plan, "model": json.loads(row.request)["model"], "timeline": True})
    answer = await run_in_threadpool(service.desk.answer, service.backend.simulate, question)
    spans = json.loads(answer)["timeline"]
    if spans is None:
        raise Problem("task-timeout", "the timeline is too long to be traced", hint="simulate it on the command line")
    headers = {"Content-Disposition": f'attachment; filename="{plan_id}.trace.json"'}
    body = await run_in_threadpool(_trace, Spans.model_validate(spans))
    return Response(body, headers=headers, media_type="application/json")


def _trace(spans: Spans) -> str:
    from stagewright.formats.chrome_trace import chrome_trace

    return json.dumps(chrome_trace(timeline_of(spans)), allow_nan=False)
