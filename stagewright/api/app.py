"""The application factory: settings and a backend in, an ASGI application out. Nothing is opened before it starts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import Route

from stagewright import __version__
from stagewright.api.auth import Guard, check_address
from stagewright.api.backend import Backend
from stagewright.api.middleware import BodyLimit, HostGuard, RequestContext
from stagewright.api.openapi import openapi_of
from stagewright.api.problems import Problem, problem_of
from stagewright.api.routes import catalog, operations, plans, playground, simulations
from stagewright.api.service import open_service
from stagewright.api.settings import Settings
from stagewright.planner.errors import StagewrightError

_ROUTERS = (simulations.ROUTER, plans.ROUTER, catalog.ROUTER, operations.ROUTER, playground.ROUTER)
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_KIND_OF_STATUS = {404: "not-found", 405: "method-not-allowed", 413: "too-large", 400: "malformed-json"}


def create_app(settings: Settings, backend: Backend) -> FastAPI:
    """Return the application; its lifespan opens the service and closes it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = open_service(settings, backend)
        try:
            check_address(settings, service.store)
            app.state.service = service
            app.state.guard = Guard(service)
            yield
        finally:
            await run_in_threadpool(service.close)

    app = FastAPI(
        title="Stagewright",
        version=__version__,
        description="Plans how a neural network is trained on a cluster, with a proof, and simulates the plan.",
        lifespan=lifespan,
        docs_url=None,  # the framework's page loads scripts from another origin
        redoc_url=None,
    )
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(Problem, _answer_problem)
    app.add_exception_handler(StagewrightError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.is_loopback:
        app.add_middleware(HostGuard, allowed=_LOOPBACK_NAMES | {settings.host})
    app.add_middleware(RequestContext)
    app.openapi = openapi_of(app)  # type: ignore[method-assign]
    return app


def _answer_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response(instance=request.url.path, request_id=request.state.request_id)


def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StagewrightError)
    return _answer_problem(request, problem_of(error))


def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details = [(".".join(str(step) for step in item["loc"]), str(item["msg"])) for item in error.errors()]
    text = "; ".join(f"{where}: {message}" for where, message in details[:8])
    if any(item["loc"][0] == "path" for item in error.errors()):
        return _answer_problem(request, Problem("not-found", f"there is nothing here: {text}"))
    errors = [{"parameter": where.partition(".")[2], "detail": message} for where, message in details]
    return _answer_problem(request, Problem("invalid-argument", text, errors=errors))


def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _KIND_OF_STATUS.get(error.status_code, "internal")
    detail = f"{request.method} {request.url.path}: {error.detail}"
    headers = {"Allow": ", ".join(_allowed(request))} if error.status_code == 405 else error.headers or {}
    return _answer_problem(request, Problem(kind, detail, headers=headers))


def _allowed(request: Request) -> list[str]:
    """Return the methods of all routes at the request's path; the router knows only those of the first."""
    methods: set[str] = set()
    for router in _ROUTERS:
        for route in router.routes:
            if isinstance(route, Route) and route.path_regex.match(request.url.path):
                methods |= route.methods or set()
    return sorted(methods)
