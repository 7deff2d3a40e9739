"""`/` and `/static`: the page that plans from a form and draws what comes back. All of it is in the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

from stagewright.api.problems import Problem

ROUTER = APIRouter(include_in_schema=False)
FOLDER = Path(__file__).parent.parent / "static"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@ROUTER.get("/")
def page(request: Request) -> Response:
    """Return the page."""
    return _file(request, "index.html")


@ROUTER.get("/static/{name}")
def asset(request: Request, name: str) -> Response:
    """Return a file of the page."""
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    path = FOLDER / name
    if path.parent != FOLDER or path.suffix not in _MEDIA_TYPES or not path.is_file():
        raise Problem("not-found", f"there is no file {name[:80]!r}")
    body = path.read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=_MEDIA_TYPES[path.suffix])
