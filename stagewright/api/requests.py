"""What requests hold, and how a body becomes one: JSON without NaN or repeated keys, no code, no path, bounded depth."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Self, TypeVar

from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from stagewright.api.problems import Problem, problem_of
from stagewright.planner.documents import Cluster, ModelProfile, Plan
from stagewright.planner.documents.document import Document, Name, canonical_json, digest_of
from stagewright.planner.documents.request import PlanRequest
from stagewright.planner.errors import StagewrightError

MAX_DEPTH = 64

Model = Annotated[Name | ModelProfile | dict[str, object], Field(union_mode="left_to_right")]


class SimulationRequest(Document):
    """A plan to simulate: `model` is a catalogue name, a config object, or the ModelProfile it was made for."""

    document_name: ClassVar[str] = "simulation request"

    plan: Plan
    model: Model
    timeline: bool = True


class ValidationRequest(Document):
    """A planning request, or a plan with the model and cluster to hold it against."""

    document_name: ClassVar[str] = "validation request"

    request: PlanRequest | None = None
    plan: Plan | None = None
    model: Model | None = None
    cluster: Annotated[Name | Cluster, Field(union_mode="left_to_right")] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.request is None) == (self.plan is None):
            raise ValueError("give either request or plan")
        return self


class CancelRequest(Document):
    """How to stop a plan: keep the best so far, or throw all away."""

    document_name: ClassVar[str] = "cancel request"

    mode: Annotated[str, Field(pattern="^(incumbent|discard)$")] = "incumbent"


async def read_object(request: Request, *, empty_is: Mapping[str, object] | None = None) -> Mapping[str, object]:
    """Return the JSON object that is a request's body; raises Problem for any other body."""
    body = await request.body()
    if not body and empty_is is not None:
        return empty_is
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise Problem("unsupported-media-type", f"the body is {media_type or 'of no declared type'}")
    return await run_in_threadpool(_parse, body)


def plan_request(value: Mapping[str, object], *, prefix: str = "") -> PlanRequest:
    """Return the planning request that parsed JSON holds; raises Problem with a pointer at each wrong field."""
    return _document(PlanRequest, _with_documents(value, prefix), prefix)


def simulation_request(value: Mapping[str, object]) -> SimulationRequest:
    """Return the simulation request that parsed JSON holds; raises Problem with a pointer at each wrong field."""
    return _document(SimulationRequest, _with_documents(value, ""), "")


def cancel_request(value: Mapping[str, object]) -> CancelRequest:
    """Return the cancel request that parsed JSON holds; raises Problem with a pointer at each wrong field."""
    return _document(CancelRequest, value, "")


def request_digest(request: PlanRequest, versions: Mapping[str, str]) -> str:
    """Return the digest of the question: what may change the answer, and not who asks or how long they wait."""
    question = request.model_dump(mode="json", exclude={"labels": True, "deadline_s": True, "job": {"deadline_s"}})
    return digest_of(canonical_json([question, dict(versions)]))


def model_name(model: str | ModelProfile | Mapping[str, object]) -> str:
    """Return the name under which a request's model is listed."""
    if isinstance(model, str):
        return model
    if isinstance(model, ModelProfile):
        return model.name
    kind = model.get("_name_or_path") or model.get("model_type")
    return str(kind)[:200] if kind else "config"


def cluster_name(cluster: str | Cluster) -> str:
    """Return the name under which a request's cluster is listed."""
    return cluster if isinstance(cluster, str) else cluster.name


def looks_like_profile(model: Mapping[str, object]) -> bool:
    """Return whether an object is meant as a ModelProfile rather than as a framework's config."""
    return "classes" in model or "layers" in model


def read_model(value: object, *, prefix: str = "") -> object:
    """Return a ModelProfile for an object that is meant as one, else the value; raises Problem for code and paths."""
    if isinstance(value, str):
        _refuse_code(value, prefix)
    elif isinstance(value, dict) and looks_like_profile(value):
        return _document(ModelProfile, value, prefix)
    return value


def read_cluster(value: object, *, prefix: str = "") -> object:
    """Return a Cluster for an object, else the value; raises Problem with a pointer at each wrong field."""
    return _document(Cluster, value, prefix) if isinstance(value, dict) else value


def _with_documents(value: Mapping[str, object], prefix: str) -> dict[str, object]:
    """Read the embedded documents on their own, so that an error in one names its field and not every alternative."""
    readers = {"model": read_model, "cluster": read_cluster}
    read = {name: reader(value[name], prefix=f"{prefix}/{name}") for name, reader in readers.items() if name in value}
    return {**value, **read}


D = TypeVar("D", bound=Document)


def _parse(body: bytes) -> Mapping[str, object]:
    try:
        value = json.loads(body, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Problem("malformed-json", f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Problem("malformed-json", f"the body is a JSON {type(value).__name__}, an object is wanted")
    _check_depth(value)
    return value


def _document(kind: type[D], value: object, prefix: str) -> D:
    try:
        return kind.from_object(value)
    except StagewrightError as error:
        raise problem_of(error, prefix=prefix) from error


def _refuse_code(model: str, prefix: str) -> None:
    if ":" in model or "/" in model or "\\" in model or re.search(r"\.(py|json)$", model):
        raise Problem(
            "model-code-refused",
            f"model {model[:80]!r} names code or a file, which this service neither runs nor reads",
            hint="send a catalogue name, a config object or a ModelProfile; `stagewright profile` writes one",
            errors=[{"pointer": prefix, "detail": "neither code nor a path"}],
        )


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise Problem("malformed-json", f"the body is nested deeper than {MAX_DEPTH} levels")


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a number a document may hold")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is beyond the numbers a document may hold")
    return number


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return result
