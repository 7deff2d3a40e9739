"""The database behind the store: engine, pragmas, migrations, and the lock that tells a lone server from one of many.

SQLite (one host) and PostgreSQL (several) run the same statements. What a dialect needs stands here and nowhere else.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from stagewright.planner.errors import InvalidArgument

READ_ONLY: Mapping[str, bool] = {"read_only": True}
"""Execution options of a connection that only reads, and so need not wait for writers."""

_BUSY_TIMEOUT_S = 30


class _DbapiConnection(Protocol):
    isolation_level: str | None

    def execute(self, statement: str) -> object: ...


def open_engine(url: str) -> sa.Engine:
    """Return an engine for `sqlite:///FILE` or `postgresql://...`; raises InvalidArgument for any other."""
    hint = "sqlite:////absolute/file.db or postgresql://user@host/name"
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InvalidArgument(f"{url!r} is no database URL", field="database_url", hint=hint) from error
    if parsed.get_backend_name() == "postgresql":
        return _open(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    if parsed.get_backend_name() != "sqlite":
        raise InvalidArgument(f"{parsed.get_backend_name()!r} databases are not known", field="database_url", hint=hint)
    if parsed.database in (None, "", ":memory:"):
        raise InvalidArgument("a database in memory is not shared", field="database_url", hint=hint)
    assert parsed.database is not None
    if not Path(parsed.database).parent.is_dir():
        raise InvalidArgument(
            f"{parsed.database}: its folder does not exist", field="database_url", hint="make the folder first"
        )
    engine = _open(parsed, connect_args={"timeout": _BUSY_TIMEOUT_S})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _open(url: sa.URL, **options: object) -> sa.Engine:
    try:
        return sa.create_engine(url, **options)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise InvalidArgument(
            f"{url.drivername} needs a driver: {error}",
            field="database_url",
            hint="pip install 'stagewright[postgres]'",
        ) from error


def upgrade(engine: sa.Engine) -> None:
    """Bring the tables to this version; nothing happens when they are. Raises InvalidArgument for a dead database."""
    with _reachable(engine), engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # Two servers that start at once must not both migrate.
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7237001)"))
        config = _alembic()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def pending(engine: sa.Engine) -> tuple[str | None, str | None] | None:
    """Return (revision found, revision needed) when they differ, else None."""
    needed = ScriptDirectory.from_config(_alembic()).get_current_head()
    with _reachable(engine), engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    return None if found == needed else (found, needed)


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


@contextmanager
def _reachable(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except sa.exc.DatabaseError as error:
        where = engine.url.render_as_string(hide_password=True)
        raise InvalidArgument(
            f"{where}: {error.orig}", field="database_url", hint="is the server up, and the path a writable database?"
        ) from error
    except CommandError as error:
        where = engine.url.render_as_string(hide_password=True)
        raise InvalidArgument(
            f"{where}: {error}", field="database_url", hint="a newer version has migrated it: use that one"
        ) from error


class Presence:
    """Says whether this is the only server on a SQLite file, and lets later ones know of this one."""

    def __init__(self, engine: sa.Engine) -> None:
        self._file: IO[str] | None = None
        self.is_alone = False
        if engine.dialect.name != "sqlite":
            return
        self._file = Path(f"{engine.url.database}.lock").open("w")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_alone = True
        except OSError:
            pass
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def close(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._file.close()


def _prepare_sqlite(connection: _DbapiConnection, _record: object) -> None:
    # The driver's own transactions begin late and upgrade a read to a write, which fails at once when another wrote.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
