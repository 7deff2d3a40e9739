"""Errors on the wire: RFC 9457 problem documents, every one with a page that explains its type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError
from starlette.responses import Response

from stagewright.planner.errors import StagewrightError

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class ProblemKind:
    """One type of problem: its status, its title, and what to do about it."""

    status: int
    title: str
    advice: str


KINDS: Mapping[str, ProblemKind] = {
    "malformed-json": ProblemKind(400, "The body is not JSON", "Send one JSON object; NaN and repeated keys are none."),
    "unauthorized": ProblemKind(401, "A key is needed", "Send `Authorization: Bearer KEY`; `stagewright keys create`."),
    "forbidden": ProblemKind(403, "The key may not do this", "Use a key with the scope that the detail names."),
    "not-found": ProblemKind(404, "There is nothing here", "See /openapi.json for the routes; plans are listed there."),
    "method-not-allowed": ProblemKind(405, "The method is not allowed here", "The header Allow lists those that are."),
    "already-final": ProblemKind(409, "The plan has its final state", "Read it; a final state is never left."),
    "too-large": ProblemKind(413, "The body is too large", "Send a smaller document, or raise the server's limit."),
    "unsupported-media-type": ProblemKind(415, "The body is not JSON", "Send `Content-Type: application/json`."),
    "wrong-host": ProblemKind(421, "This server does not answer for that host", "Use localhost, or configure keys."),
    "invalid-document": ProblemKind(422, "The document is not valid", "Correct the fields that `errors` points at."),
    "invalid-argument": ProblemKind(422, "An argument is not valid", "Correct the field that `errors` points at."),
    "model-code-refused": ProblemKind(
        422, "Models in code are not accepted here", "`module:factory` works on the command line; send its profile."
    ),
    "infeasible": ProblemKind(422, "Nothing fits", "`result.diagnosis` holds the nearest plan and what would fit."),
    "queue-full": ProblemKind(429, "Too many plans wait", "Try again after the seconds in the header Retry-After."),
    "no-incumbent": ProblemKind(500, "No plan was found in time", "Give a longer deadline, or a smaller space."),
    "solver-died": ProblemKind(500, "The solver's process died", "The plan was started again and died again."),
    "internal": ProblemKind(500, "A defect of the service", "Please report it with the request_id."),
    "not-ready": ProblemKind(503, "The service is not ready", "Try again shortly."),
    "task-timeout": ProblemKind(503, "The simulation took too long", "Send a smaller plan, or plan with a deadline."),
}


@dataclass
class Problem(Exception):
    """A problem to answer with; raise it anywhere below a route."""

    kind: str
    detail: str
    hint: str | None = None
    errors: Sequence[Mapping[str, str]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.detail

    @property
    def status(self) -> int:
        return KINDS[self.kind].status

    def document(self, *, instance: str | None = None, request_id: str | None = None) -> dict[str, object]:
        """Return the problem document."""
        kind = KINDS[self.kind]
        document: dict[str, object] = {
            "type": f"/problems/{self.kind}",
            "title": kind.title,
            "status": kind.status,
            "detail": self.detail,
        }
        if instance is not None:
            document["instance"] = instance
        if self.hint:
            document["hint"] = self.hint
        if self.errors:
            document["errors"] = [dict(error) for error in self.errors]
        if request_id is not None:
            document["request_id"] = request_id
        return document

    def response(self, *, instance: str, request_id: str | None) -> Response:
        """Return the response that holds this problem."""
        body = json.dumps(self.document(instance=instance, request_id=request_id), ensure_ascii=False)
        return Response(body, self.status, dict(self.headers), media_type=MEDIA_TYPE)


def problem_of(error: StagewrightError, *, prefix: str = "") -> Problem:
    """Return the problem that says what `error` says; `prefix` is the pointer of the document inside the body."""
    kind = error.kind if error.kind in KINDS else "invalid-argument" if error.exit_code == 2 else "internal"
    return Problem(kind, error.message, hint=error.hint, errors=_errors(error, prefix))


def _errors(error: StagewrightError, prefix: str) -> list[dict[str, str]]:
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return [
            {"pointer": prefix + _pointer(item["loc"]), "detail": item["msg"]}
            for item in cause.errors(include_url=False, include_context=False, include_input=False)[:50]
        ]
    if error.field is None:
        return [{"pointer": prefix, "detail": error.message}] if prefix else []
    return [{"pointer": prefix + pointer_of(error.field), "detail": error.message}]


def pointer_of(path: str) -> str:
    """Return the JSON Pointer of a field path: `stages[2].degrees` is `/stages/2/degrees`."""
    steps = path.replace("[", ".").replace("]", "").split(".")
    return "".join(f"/{step}" for step in steps if step and not step.startswith("("))


def _pointer(location: tuple[int | str, ...]) -> str:
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in location)
