"""The running service: what the routes share, opened and closed as one."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool

from stagewright.api.backend import Backend
from stagewright.api.changes import Changes
from stagewright.api.database import Presence, open_engine, pending, upgrade
from stagewright.api.desk import Desk
from stagewright.api.dispatcher import Dispatcher, DispatcherPolicy
from stagewright.api.problems import Problem
from stagewright.api.settings import Settings
from stagewright.api.store import PlanRow, Store
from stagewright.planner.errors import InvalidArgument

_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, eq=False)
class Service:
    """Settings, backend and everything that lives as long as the application."""

    settings: Settings
    backend: Backend
    engine: sa.Engine
    store: Store
    presence: Presence
    dispatcher: Dispatcher
    desk: Desk
    changes: Changes

    def close(self) -> None:
        """Kill what still computes, queue it again, and let go of the database."""
        self.dispatcher.stop()
        self.desk.close()
        self.presence.close()
        self.engine.dispose()

    def plan(self, plan_id: str) -> PlanRow:
        """Return a stored plan; raises the problem not-found."""
        row = self.store.get(plan_id)
        if row is None:
            raise Problem("not-found", f"there is no plan {plan_id[:80]!r}")
        return row

    async def wait_final(self, plan_id: str, wait_s: float) -> PlanRow:
        """Return the plan once it is final, or as it is after `wait_s`; raises the problem not-found."""
        end = time.monotonic() + wait_s
        with self.changes.watch(plan_id) as watch:
            while True:
                row = await run_in_threadpool(self.plan, plan_id)
                left = end - time.monotonic()
                if row.state.is_final or left <= 0:
                    return row
                await watch.changed(min(left, _LOOK_AGAIN_S))


def open_service(settings: Settings, backend: Backend) -> Service:
    """Open the store and start the processes; call it on the loop that serves.

    Raises InvalidArgument when the database is out of reach, or when its tables are of another version.
    """
    engine = open_engine(settings.database_url)
    check_tables(engine)
    store, changes, presence = Store(engine), Changes(), Presence(engine)
    changes.bind(asyncio.get_running_loop())
    policy = DispatcherPolicy(
        workers=settings.workers,
        stop_grace_s=settings.stop_grace_s,
        max_attempts=settings.max_attempts,
        lease_s=settings.lease_s,
        memory_bytes=settings.solver_memory_bytes,
        prepare=backend.prepare,
    )
    dispatcher = Dispatcher(store, backend.solve, policy, on_change=changes.note)
    desk = Desk(timeout_s=settings.task_timeout_s, memory_bytes=settings.solver_memory_bytes, prepare=backend.prepare)
    service = Service(settings, backend, engine, store, presence, dispatcher, desk, changes)
    dispatcher.start(is_alone=presence.is_alone)
    threading.Thread(target=desk.warm_up, name="desk-warm-up", daemon=True).start()
    return service


def check_tables(engine: sa.Engine) -> None:
    """Migrate a SQLite file to this version; raises InvalidArgument when another database is not at it."""
    if engine.dialect.name == "sqlite":
        upgrade(engine)
        return
    difference = pending(engine)
    if difference is not None:
        found, needed = difference
        raise InvalidArgument(
            f"the database is at revision {found}, this version needs {needed}",
            field="database_url",
            hint="run `stagewright db upgrade`",
        )
