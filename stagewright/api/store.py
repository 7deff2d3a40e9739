"""The store: plans from acceptance to their one final state, their outcomes, and keys.

Every change of a plan is one conditional UPDATE, so that of two that race for it exactly one wins, on SQLite and on
PostgreSQL alike, in one process or in several servers:

- `claim` takes a queued plan only while it is queued;
- `finish` and `release` act only for the boot and the attempt that claimed it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from stagewright.api.database import READ_ONLY
from stagewright.api.lifecycle import CancelMode, Ending, Failure, State, Termination
from stagewright.api.tables import KEYS, LABELS, OUTCOMES, PLANS
from stagewright.planner.documents.document import canonical_json
from stagewright.planner.documents.outcome import Progress


@dataclass(frozen=True)
class NewPlan:
    """What is known of a plan when it is accepted; `request` is canonical JSON."""

    request: str
    request_digest: str
    model: str
    cluster: str
    labels: Mapping[str, str]
    deadline_s: float


@dataclass(frozen=True)
class PlanRow:
    """One plan as it is stored; times are seconds since 1970."""

    seq: int
    id: str
    version: int
    state: State
    termination: Termination | None
    cached: bool
    request: str
    model: str
    cluster: str
    labels: Mapping[str, str]
    outcome_digest: str | None
    failure: Failure | None
    progress: Progress | None
    cancel_mode: CancelMode | None
    attempt: int
    boot_id: str | None
    deadline_s: float
    deadline_at: float
    created_at: float
    started_at: float | None
    finished_at: float | None


@dataclass(frozen=True)
class PlanFilter:
    """Which plans to list; None is any."""

    state: State | None = None
    model: str | None = None
    cluster: str | None = None
    labels: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Key:
    """An API key without its secret."""

    id: str
    name: str
    scopes: tuple[str, ...]
    created_at: float
    revoked_at: float | None


class Store:
    """Plans and keys in one database."""

    def __init__(self, engine: sa.Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def accept(self, plan: NewPlan, *, use_cache: bool = True) -> PlanRow:
        """Store a new plan: finished at once when the same question has a proven answer, else queued."""
        now = self._clock()
        row: dict[str, object] = {
            "id": f"plan_{secrets.token_hex(12)}",
            "version": 1,
            "state": State.QUEUED,
            "cached": False,
            "request": plan.request,
            "request_digest": plan.request_digest,
            "model": plan.model,
            "cluster": plan.cluster,
            "labels": canonical_json(dict(plan.labels)),
            "attempt": 0,
            "deadline_s": plan.deadline_s,
            "deadline_at": now + plan.deadline_s,
            "created_at": now,
        }
        with self._engine.begin() as connection:
            known = _proven(connection, plan.request_digest) if use_cache else None
            if known is not None:
                row |= known | {"cached": True, "started_at": now, "finished_at": now}
            seq = connection.execute(sa.insert(PLANS).values(row).returning(PLANS.c.seq)).scalar_one()
            for name, value in sorted(plan.labels.items()):
                connection.execute(sa.insert(LABELS).values(plan_seq=seq, name=name, value=value))
            stored = connection.execute(sa.select(PLANS).where(PLANS.c.seq == seq)).one()
        return _plan_row(stored)

    def get(self, plan_id: str) -> PlanRow | None:
        """Return a plan, or None."""
        with self._reader() as connection:
            found = connection.execute(sa.select(PLANS).where(PLANS.c.id == plan_id)).one_or_none()
        return None if found is None else _plan_row(found)

    def outcome_json(self, digest: str) -> str:
        """Return the canonical JSON of a stored outcome."""
        with self._reader() as connection:
            found = connection.execute(sa.select(OUTCOMES.c.document).where(OUTCOMES.c.digest == digest)).scalar_one()
        return str(found)

    def page(self, wanted: PlanFilter, *, limit: int, before_seq: int | None = None) -> tuple[list[PlanRow], bool]:
        """Return the newest plans that match, from below `before_seq`, and whether there are more."""
        query = sa.select(PLANS).order_by(PLANS.c.seq.desc()).limit(limit + 1)
        if before_seq is not None:
            query = query.where(PLANS.c.seq < before_seq)
        for column, value in ((PLANS.c.state, wanted.state), (PLANS.c.model, wanted.model)):
            query = query if value is None else query.where(column == value)
        if wanted.cluster is not None:
            query = query.where(PLANS.c.cluster == wanted.cluster)
        for name, value in wanted.labels:
            matching = sa.select(LABELS.c.plan_seq).where(LABELS.c.name == name, LABELS.c.value == value)
            query = query.where(PLANS.c.seq.in_(matching))
        with self._reader() as connection:
            rows = [_plan_row(row) for row in connection.execute(query)]
        return rows[:limit], len(rows) > limit

    def num_queued(self) -> int:
        """Return how many plans wait."""
        query = sa.select(sa.func.count()).select_from(PLANS).where(PLANS.c.state == State.QUEUED)
        with self._reader() as connection:
            return int(connection.execute(query).scalar_one())

    def claim(self, boot_id: str) -> PlanRow | None:
        """Take the oldest queued plan for this server; None when there is none, or when another was faster."""
        now = self._clock()
        oldest = sa.select(PLANS.c.seq).where(PLANS.c.state == State.QUEUED).order_by(PLANS.c.seq).limit(1)
        with self._reader() as connection:
            seq = connection.execute(oldest).scalar_one_or_none()
        if seq is None:
            return None
        return self._change(
            sa.and_(PLANS.c.seq == seq, PLANS.c.state == State.QUEUED),
            state=State.RUNNING,
            boot_id=boot_id,
            attempt=PLANS.c.attempt + 1,
            heartbeat_at=now,
            started_at=sa.func.coalesce(PLANS.c.started_at, now),
            progress=None,
        )

    def report(self, row: PlanRow, boot_id: str, progress: Progress) -> PlanRow | None:
        """Store the progress of a running plan and return its row; None when it is no longer this server's."""
        return self._change(_owned(row, boot_id), progress=canonical_json(asdict(progress)))

    def finish(self, row: PlanRow, boot_id: str, ending: Ending) -> bool:
        """Give a running plan its final state; False when it is no longer this server's to finish."""
        return self._finish(_owned(row, boot_id), ending) is not None

    def finish_queued(self, row: PlanRow, ending: Ending) -> bool:
        """Give a plan that still waits its final state; False when it no longer waits."""
        return self._finish(sa.and_(PLANS.c.seq == row.seq, PLANS.c.state == State.QUEUED), ending) is not None

    def release(self, row: PlanRow, boot_id: str, *, refund: bool) -> bool:
        """Queue a running plan again; False when it is no longer this server's. `refund` does not count the attempt."""
        attempt = PLANS.c.attempt - (1 if refund else 0)
        released = self._change(
            _owned(row, boot_id), state=State.QUEUED, boot_id=None, heartbeat_at=None, progress=None, attempt=attempt
        )
        return released is not None

    def request_cancel(self, row: PlanRow, mode: CancelMode) -> PlanRow | None:
        """Ask a plan to stop: one that waits is cancelled, one that runs is told; None when it is final."""
        if self.finish_queued(row, Ending(State.CANCELLED, "cancelled")):
            return self.get(row.id)
        running = sa.and_(PLANS.c.seq == row.seq, PLANS.c.state == State.RUNNING)
        if mode == "incumbent":
            # A discard that was asked for before stays one.
            return self._change(running, cancel_mode=sa.func.coalesce(PLANS.c.cancel_mode, mode))
        return self._change(running, cancel_mode=mode)

    def overdue(self) -> list[PlanRow]:
        """Return the queued plans whose deadline has passed."""
        late = sa.select(PLANS).where(PLANS.c.state == State.QUEUED, PLANS.c.deadline_at <= self._clock())
        with self._reader() as connection:
            return [_plan_row(row) for row in connection.execute(late)]

    def heartbeat(self, boot_id: str, seqs: Sequence[int]) -> None:
        """Renew the lease of plans that this server runs."""
        owned = sa.and_(PLANS.c.seq.in_(seqs), PLANS.c.state == State.RUNNING, PLANS.c.boot_id == boot_id)
        with self._engine.begin() as connection:
            connection.execute(sa.update(PLANS).where(owned).values(heartbeat_at=self._clock()))

    def requeue_dead(self, *, lease_s: float) -> int:
        """Queue again the running plans that nobody has spoken for since `lease_s`; their deadlines start anew."""
        now = self._clock()
        dead = sa.and_(PLANS.c.state == State.RUNNING, PLANS.c.heartbeat_at <= now - lease_s)
        values = {
            "state": State.QUEUED,
            "boot_id": None,
            "heartbeat_at": None,
            "progress": None,
            "attempt": PLANS.c.attempt - 1,
            "deadline_at": now + PLANS.c.deadline_s,
            "version": PLANS.c.version + 1,
        }
        with self._engine.begin() as connection:
            return connection.execute(sa.update(PLANS).where(dead).values(values)).rowcount

    def extend_queued(self) -> None:
        """Start the deadlines of waiting plans anew: the time in which no server ran is not theirs."""
        late = sa.and_(PLANS.c.state == State.QUEUED, PLANS.c.deadline_at <= self._clock())
        with self._engine.begin() as connection:
            connection.execute(sa.update(PLANS).where(late).values(deadline_at=self._clock() + PLANS.c.deadline_s))

    def create_key(self, name: str, scopes: Sequence[str]) -> tuple[Key, str]:
        """Store a new key and return it with its secret, which is nowhere else."""
        secret = f"pk_{secrets.token_urlsafe(32)}"
        key = Key(f"key_{secrets.token_hex(6)}", name, tuple(scopes), self._clock(), None)
        with self._engine.begin() as connection:
            connection.execute(
                sa.insert(KEYS).values(
                    id=key.id,
                    name=name,
                    sha256=_sha256(secret),
                    scopes=" ".join(scopes),
                    created_at=key.created_at,
                )
            )
        return key, secret

    def revoke_key(self, key_id: str) -> bool:
        """Make a key worthless; False when there is no such key in force."""
        valid = sa.and_(KEYS.c.id == key_id, KEYS.c.revoked_at.is_(None))
        with self._engine.begin() as connection:
            return connection.execute(sa.update(KEYS).where(valid).values(revoked_at=self._clock())).rowcount > 0

    def list_keys(self) -> list[Key]:
        """Return all keys, oldest first."""
        with self._reader() as connection:
            return [_key(row) for row in connection.execute(sa.select(KEYS).order_by(KEYS.c.created_at, KEYS.c.id))]

    def key_of(self, secret: str) -> Key | None:
        """Return the key in force that has this secret."""
        query = sa.select(KEYS).where(KEYS.c.sha256 == _sha256(secret), KEYS.c.revoked_at.is_(None))
        with self._reader() as connection:
            found = connection.execute(query).one_or_none()
        return None if found is None else _key(found)

    def _reader(self) -> sa.Connection:
        return self._engine.connect().execution_options(**READ_ONLY)

    def _finish(self, condition: sa.ColumnElement[bool], ending: Ending) -> PlanRow | None:
        digest, document = None, None
        if ending.outcome is not None:
            document = ending.outcome.canonical_json()
            digest = ending.outcome.digest
        with self._engine.connect() as connection, connection.begin() as transaction:
            if digest is not None and document is not None:
                _keep_outcome(connection, digest, document)
            finished = _update(
                connection,
                condition,
                state=ending.state,
                termination=ending.termination,
                outcome_digest=digest,
                failure=None if ending.failure is None else canonical_json(asdict(ending.failure)),
                boot_id=None,
                heartbeat_at=None,
                finished_at=self._clock(),
            )
            if finished is None:
                transaction.rollback()
            return finished

    def _change(self, condition: sa.ColumnElement[bool], **values: object) -> PlanRow | None:
        with self._engine.begin() as connection:
            return _update(connection, condition, **values)


def _update(connection: sa.Connection, condition: sa.ColumnElement[bool], **values: object) -> PlanRow | None:
    statement = sa.update(PLANS).where(condition).values(version=PLANS.c.version + 1, **values).returning(PLANS)
    changed = connection.execute(statement).one_or_none()
    return None if changed is None else _plan_row(changed)


def _keep_outcome(connection: sa.Connection, digest: str, document: str) -> None:
    with contextlib.suppress(sa.exc.IntegrityError), connection.begin_nested():
        connection.execute(sa.insert(OUTCOMES).values(digest=digest, document=document))


def _proven(connection: sa.Connection, request_digest: str) -> dict[str, object] | None:
    """Return the final columns of an earlier answer that no clock took part in."""
    found = connection.execute(
        sa.select(PLANS.c.state, PLANS.c.termination, PLANS.c.outcome_digest)
        .where(
            PLANS.c.request_digest == request_digest,
            sa.or_(
                PLANS.c.state == State.INFEASIBLE,
                sa.and_(PLANS.c.state == State.SUCCEEDED, PLANS.c.termination.in_(("optimal", "gap"))),
            ),
        )
        .order_by(PLANS.c.seq.desc())
        .limit(1)
    ).one_or_none()
    return None if found is None else dict(found._mapping)


def _owned(row: PlanRow, boot_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(
        PLANS.c.seq == row.seq,
        PLANS.c.state == State.RUNNING,
        PLANS.c.boot_id == boot_id,
        PLANS.c.attempt == row.attempt,
    )


def _plan_row(row: sa.Row[tuple[object, ...]]) -> PlanRow:
    values = row._mapping
    return PlanRow(
        seq=values["seq"],
        id=values["id"],
        version=values["version"],
        state=State(values["state"]),
        termination=values["termination"],
        cached=bool(values["cached"]),
        request=values["request"],
        model=values["model"],
        cluster=values["cluster"],
        labels=json.loads(values["labels"]),
        outcome_digest=values["outcome_digest"],
        failure=None if values["failure"] is None else Failure(**json.loads(values["failure"])),
        progress=None if values["progress"] is None else Progress(**json.loads(values["progress"])),
        cancel_mode=values["cancel_mode"],
        attempt=values["attempt"],
        boot_id=values["boot_id"],
        deadline_s=values["deadline_s"],
        deadline_at=values["deadline_at"],
        created_at=values["created_at"],
        started_at=values["started_at"],
        finished_at=values["finished_at"],
    )


def _key(row: sa.Row[tuple[object, ...]]) -> Key:
    values = row._mapping
    scopes = tuple(str(values["scopes"]).split())
    return Key(values["id"], values["name"], scopes, values["created_at"], values["revoked_at"])


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
