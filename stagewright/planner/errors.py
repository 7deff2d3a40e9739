"""Every error a user can cause: what is wrong, in which field, and the way out.

`kind` is stable text for scripts; `exit_code` is the command line's (contract.md): 2 for an invalid document or
argument, 3 for infeasible, 4 for a limit without an incumbent, 5 for not expressible, 7 for remote failures.
"""

from __future__ import annotations

from typing import ClassVar


class StagewrightError(Exception):
    """An error with a message for people and a kind for programs."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.hint = hint

    def to_json(self) -> dict[str, str | None]:
        """Return the object that stands under `error` on the command line and in problem documents."""
        return {"kind": self.kind, "message": self.message, "field": self.field, "hint": self.hint}

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.field, self.hint)


class InvalidDocument(StagewrightError):
    """A document that does not parse, does not validate, or belongs to another document."""

    kind = "invalid-document"
    exit_code = 2


class InvalidArgument(StagewrightError):
    """An argument out of its range, or two arguments that contradict each other."""

    kind = "invalid-argument"
    exit_code = 2


class InvalidSchedule(StagewrightError):
    """A schedule that cannot run: an action missing, out of order, deadlocked or over its memory cap."""

    kind = "invalid-schedule"
    exit_code = 2


class Infeasible(StagewrightError):
    """Nothing in the declared space satisfies the constraints."""

    kind = "infeasible"
    exit_code = 3


class NoIncumbent(StagewrightError):
    """A deadline or a cancel came before the first solution."""

    kind = "no-incumbent"
    exit_code = 4


class NotExpressible(StagewrightError):
    """The target format cannot hold the plan."""

    kind = "not-expressible"
    exit_code = 5


class RunFailed(StagewrightError):
    """A rank raised, died or fell silent while a plan was running."""

    kind = "run-failed"
    exit_code = 1


class RankLost(RunFailed):
    """A rank died, fell silent or was cut off: others can go on without it."""

    def __init__(self, message: str, *, rank: int = -1, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, field=field, hint=hint)
        self.rank = rank


class RemoteError(StagewrightError):
    """The service could not be reached, or refused."""

    kind = "remote"
    exit_code = 7


def _rebuild(cls: type[StagewrightError], message: str, field: str | None, hint: str | None) -> StagewrightError:
    return cls(message, field=field, hint=hint)
