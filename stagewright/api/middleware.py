"""What surrounds every request, in plain ASGI: a request id, safe headers, the host, the size of the body, and defects.

They answer with problem documents too. A framework's own limit answers a declared length in plain text and a chunked
body through the application's handlers; here both are one.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stagewright.api.problems import Problem

_LOG = logging.getLogger(__name__)

CONTENT_SECURITY_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'; object-src 'none'"
)
_SAFE_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestContext:
    """Gives each request an id and each response the safe headers; a defect becomes a problem, not a bare 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in {**_SAFE_HEADERS, "x-request-id": request_id}.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if started:
                raise
            problem = error if isinstance(error, Problem) else None
            if problem is None:
                _LOG.exception("%s %s failed (%s)", scope["method"], scope["path"], request_id)
                problem = Problem("internal", "a defect of the service; its log has the details")
            response = problem.response(instance=scope["path"], request_id=request_id)
            await response(scope, receive, send_with_headers)


class HostGuard:
    """Refuses requests for other hosts, so that a web page cannot reach a keyless service under a name of its own."""

    def __init__(self, app: ASGIApp, *, allowed: frozenset[str]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
            if name.strip("[]").lower() not in self._allowed:
                raise Problem("wrong-host", f"host {host[:80]!r} is none of {', '.join(sorted(self._allowed))}")
        await self._app(scope, receive, send)


_DRAIN_S = 5.0
_DRAIN_LIMITS = 4


class BodyLimit:
    """Refuses bodies above a size, by their declared length at once, and chunked ones as they grow past it.

    What is still on its way is read and thrown away first, within bounds: a connection closed with bytes unread is
    reset, and the client would see that instead of the answer.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            if Headers(scope=scope).get("expect", "").lower() != "100-continue":
                await self._drain(receive)
            raise self._too_large(int(declared))
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    if message.get("more_body", False):
                        await self._drain(receive)
                    raise self._too_large(received)
            return message

        await self._app(scope, receive_within_limit, send)

    async def _drain(self, receive: Receive) -> None:
        """Reads on until the body ends, or some limits' worth of bytes or a few seconds have passed."""
        left = _DRAIN_LIMITS * self._max_bytes
        try:
            async with asyncio.timeout(_DRAIN_S):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    def _too_large(self, num_bytes: int) -> Problem:
        return Problem(
            "too-large",
            f"the body has at least {num_bytes} bytes, the limit is {self._max_bytes}",
            hint="the server's setting STAGEWRIGHT_MAX_BODY_BYTES raises it",
            headers={"Connection": "close"},
        )
