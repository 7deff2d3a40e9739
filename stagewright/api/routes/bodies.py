"""How routes that read their own bodies, and answer with problems, say so in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from stagewright.api.problems import MEDIA_TYPE
from stagewright.api.resources import ProblemDocument
from stagewright.planner.documents.document import Document

REFERENCE = "#/components/schemas/{model}"


def body_of(document: type[Document], *, required: bool = True) -> dict[str, Any]:
    """Return the OpenAPI entry of a JSON body; `openapi.py` adds the schema it refers to."""
    schema = {"$ref": REFERENCE.format(model=document.__name__)}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """Return the OpenAPI entries of the problems that a route answers with."""
    content = {MEDIA_TYPE: {"schema": {"$ref": REFERENCE.format(model=ProblemDocument.__name__)}}}
    return {status: {"description": "A problem document.", "content": content} for status in statuses}
