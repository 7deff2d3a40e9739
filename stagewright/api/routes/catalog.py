"""`/v1/catalog`: what the pickers offer."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from stagewright.api.auth import may
from stagewright.api.service import Service

ROUTER = APIRouter(prefix="/v1/catalog", tags=["catalog"], dependencies=[Depends(may("read"))])


class CatalogPage(BaseModel):
    """All entries of one catalogue; each has at least a name."""

    data: list[dict[str, object]]


@ROUTER.get("/{name}")
def read_catalog(request: Request, name: Literal["gpus", "models", "clusters", "schedules"]) -> CatalogPage:
    """List the known devices, models, clusters or schedules."""
    service: Service = request.app.state.service
    return CatalogPage(data=[dict(entry) for entry in service.backend.catalog[name]()])
