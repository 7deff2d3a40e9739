"""What operators ask: alive, ready, which version, what a problem means."""

from __future__ import annotations

import html
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.responses import JSONResponse

from stagewright import __version__
from stagewright.api.database import pending
from stagewright.api.problems import KINDS, Problem
from stagewright.api.routes.bodies import problems
from stagewright.api.service import Service
from stagewright.planner.errors import StagewrightError

ROUTER = APIRouter(tags=["operations"])


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Readiness(BaseModel):
    """Whether plans can be taken: each check by name, "ok" or what is wrong."""

    status: Literal["ready", "not-ready"]
    checks: dict[str, str]


class Version(BaseModel):
    """The product's version and what answers depend on."""

    version: str
    api: str
    versions: dict[str, str]


@ROUTER.get("/livez")
async def livez() -> Alive:
    """Answer as long as the process can."""
    return Alive()


@ROUTER.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
def readyz(request: Request) -> Response:
    """Check the store, its tables and the solver processes."""
    service: Service = request.app.state.service
    checks = {"store": "ok", "tables": "ok", "solvers": "ok"}
    try:
        service.store.num_queued()
        if pending(service.engine) is not None:
            checks["tables"] = "not at this version; run `stagewright db upgrade`"
    except Exception as error:  # whatever a driver raises, the answer is: not ready
        checks["store"] = error.message if isinstance(error, StagewrightError) else type(error).__name__
    if service.dispatcher.num_ready == 0:
        checks["solvers"] = "none is ready yet"
    ready = all(value == "ok" for value in checks.values())
    answer = Readiness(status="ready" if ready else "not-ready", checks=checks)
    return JSONResponse(answer.model_dump(), 200 if ready else 503)


@ROUTER.get("/version")
async def version(request: Request) -> Version:
    """Return versions."""
    service: Service = request.app.state.service
    return Version(version=__version__, api="v1", versions=dict(service.backend.versions))


@ROUTER.get("/problems/{kind}", response_class=HTMLResponse, responses=problems(404), include_in_schema=False)
async def explain_problem(kind: str) -> HTMLResponse:
    """Explain a type of problem to people."""
    known = KINDS.get(kind)
    if known is None:
        raise Problem("not-found", f"there is no problem {kind[:80]!r}", hint="known: " + ", ".join(KINDS))
    title, advice = html.escape(known.title), html.escape(known.advice)
    return HTMLResponse(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f'<link rel=stylesheet href="/static/style.css"><main class="prose"><h1>{title}</h1>'
        f"<p>{advice}</p><p>Status {known.status}, type <code>/problems/{html.escape(kind)}</code></p></main></html>"
    )
