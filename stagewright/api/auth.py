"""Who may do what: API keys in the header Authorization, needed everywhere once the store has had one."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import Request

from stagewright.api.problems import Problem
from stagewright.api.service import Service
from stagewright.api.settings import Settings
from stagewright.api.store import Store
from stagewright.planner.errors import InvalidArgument

SCOPES = ("read", "plan", "admin")
_TRUST_S = 2.0


class Guard:
    """Checks keys; remembers for two seconds whether the store has any, so that keyless use costs nothing."""

    def __init__(self, service: Service, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._clock = clock
        self._asked_at = float("-inf")
        self._needed = False

    def check(self, header: str, scope: str) -> None:
        """Return for a request that may act in `scope`; raises the problem unauthorized or forbidden."""
        if not self._is_needed():
            return
        scheme, _, secret = header.partition(" ")
        key = self._service.store.key_of(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise Problem(
                "unauthorized",
                "the key is unknown or revoked" if header else "this server needs a key",
                headers={"WWW-Authenticate": 'Bearer realm="stagewright"'},
            )
        if scope not in key.scopes and "admin" not in key.scopes:
            raise Problem("forbidden", f"key {key.id} has {', '.join(key.scopes)}; {scope} is needed")

    def _is_needed(self) -> bool:
        if self._service.settings.insecure_no_auth:
            return False
        now = self._clock()
        if not self._needed and now - self._asked_at > _TRUST_S:
            self._asked_at = now
            self._needed = bool(self._service.store.list_keys())
        return self._needed


def may(scope: str) -> Callable[[Request], None]:
    """Return a route dependency that lets pass who may act in `scope`."""

    def check(request: Request) -> None:
        guard: Guard = request.app.state.guard
        guard.check(request.headers.get("authorization", ""), scope)

    return check


def check_address(settings: Settings, store: Store) -> None:
    """Raise InvalidArgument when others could reach a service that asks for no key."""
    if settings.is_loopback or settings.insecure_no_auth or any(key.revoked_at is None for key in store.list_keys()):
        return
    raise InvalidArgument(
        f"{settings.host} can be reached from other machines, and there is no key",
        field="host",
        hint="run `stagewright keys create`, listen on 127.0.0.1, or accept it with --insecure-no-auth",
    )
