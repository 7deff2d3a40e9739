"""Settings of the service, read once at the edge: flags, then `STAGEWRIGHT_*` in the environment, then defaults."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from stagewright.planner.documents.document import invalid_document
from stagewright.planner.errors import InvalidArgument

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """What an operator may choose.

    Parameters
    ----------
    host, port : where to listen; port 0 takes a free one.
    database_url : SQLAlchemy URL; a SQLite file in the user's state folder unless told.
    workers : solver processes; one solve each.
    solver_memory_bytes : address space of one solver process; None leaves it unlimited.
    default_deadline_s, max_deadline_s : of a request that names none, and the most one may ask.
    stop_grace_s : between asking a solve to stop and killing its process.
    max_attempts : how often a plan whose process died is started before it fails.
    max_queued : plans that may wait; the next one is refused with 429.
    max_body_bytes : the largest request body.
    max_devices : the largest cluster a request may hold.
    max_wait_s : the longest a request is held by `Prefer: wait` or `?wait=`.
    task_timeout_s : the longest a simulation or a validation may take.
    lease_s : after this long without a sign of life, a server's running plans are another's to run again.
    insecure_no_auth : answer without keys, on any address.
    """

    model_config = SettingsConfigDict(env_prefix="STAGEWRIGHT_", frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    database_url: str = ""
    workers: Count = Field(default_factory=lambda: min(4, os.cpu_count() or 1))
    solver_memory_bytes: Count | None = None
    default_deadline_s: Seconds = 60.0
    max_deadline_s: Seconds = 3600.0
    stop_grace_s: Seconds = 2.0
    max_attempts: Count = 3
    max_queued: Count = 256
    max_body_bytes: Count = 16 * 2**20
    max_devices: Count = 131_072
    max_wait_s: Seconds = 60.0
    task_timeout_s: Seconds = 30.0
    lease_s: Seconds = 15.0
    insecure_no_auth: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.default_deadline_s > self.max_deadline_s:
            raise ValueError(
                f"default_deadline_s {self.default_deadline_s:g} exceeds max_deadline_s {self.max_deadline_s:g}"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """True when only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_settings(**overrides: object) -> Settings:
    """Return the settings of this process; `None` overrides nothing. Raises InvalidArgument naming the setting."""
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        settings = Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        problem = invalid_document("setting", error)
        variable = f"STAGEWRIGHT_{(problem.field or '').upper()}"
        raise InvalidArgument(problem.message, field=problem.field, hint=f"correct the flag or {variable}") from error
    if settings.database_url:
        return settings
    return settings.model_copy(update={"database_url": f"sqlite:///{_state_folder() / 'service.db'}"})


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    folder = (Path(base) if base else Path.home() / ".local" / "state") / "stagewright"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InvalidArgument(
            f"{folder}: cannot be made: {error}", field="database_url", hint="name a database with --database"
        ) from error
    return folder
