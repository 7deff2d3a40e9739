"""The OpenAPI document, with the schemas of the documents that routes read by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from stagewright.api.requests import CancelRequest, SimulationRequest, ValidationRequest
from stagewright.api.resources import ProblemDocument
from stagewright.api.routes.bodies import REFERENCE, problems
from stagewright.planner.documents.request import PlanRequest

_READ_BY_ROUTES = (PlanRequest, SimulationRequest, ValidationRequest, CancelRequest, ProblemDocument)


def openapi_of(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Return the function that makes (once) the OpenAPI document of an application."""

    def make() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, schemas = models_json_schema(
                [(model, "validation") for model in _READ_BY_ROUTES], ref_template=REFERENCE
            )
            _say_problem(document)
            components = document.setdefault("components", {}).setdefault("schemas", {})
            for name, schema in schemas.get("$defs", {}).items():
                components.setdefault(name, schema)
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    return make


def _say_problem(document: dict[str, Any]) -> None:
    """Replace the framework's own answer to wrong parameters, which this service does not give."""
    for methods in document["paths"].values():
        for operation in methods.values():
            if "422" in operation["responses"]:
                operation["responses"]["422"] = problems(422)[422]
