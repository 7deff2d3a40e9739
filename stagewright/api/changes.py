"""Wakes those who wait for a plan to change: long polls and event streams on the loop, told from solver threads."""

from __future__ import annotations

import asyncio
from collections import defaultdict


class Changes:
    """Waiters by plan. Notes may come from any thread; waiting happens on the loop that `bind` was called on.

    A change that another server made is not noted here, so waiters look again from time to time by themselves.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop on which the waiters wait."""
        self._loop = loop

    def note(self, plan_id: str) -> None:
        """Wake all who wait for this plan; callable from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, plan_id)

    def watch(self, plan_id: str) -> Watch:
        """Return a watch on a plan; make it before reading the plan, so that no change falls between."""
        return Watch(self, plan_id)

    def _wake(self, plan_id: str) -> None:
        for event in self._waiters.get(plan_id, ()):
            event.set()


class Watch:
    """One waiter, as a context manager."""

    def __init__(self, changes: Changes, plan_id: str) -> None:
        self._changes = changes
        self._plan_id = plan_id
        self._event = asyncio.Event()

    def __enter__(self) -> Watch:
        self._changes._waiters[self._plan_id].add(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        waiters = self._changes._waiters[self._plan_id]
        waiters.discard(self._event)
        if not waiters:
            del self._changes._waiters[self._plan_id]

    async def changed(self, timeout_s: float) -> None:
        """Return at the next change, or after `timeout_s`."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except TimeoutError:
            return
        self._event.clear()
