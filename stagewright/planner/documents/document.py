"""The base of the durable documents: frozen, strict, canonical JSON, content digest, safe files.

The same content gives the same bytes of JSON and so the same digest. A file is written beside its target and renamed,
so that neither a full disk nor a kill leaves half a document.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stagewright.planner.errors import InvalidDocument

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=200)]

MAX_FILE_BYTES = 256 * 2**20


class Part(BaseModel):
    """A piece of a document: frozen, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Document(Part):
    """A durable document with `schema_version`, canonical JSON and a content digest."""

    document_name: ClassVar[str] = "document"

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1

    def canonical_json(self) -> str:
        """Return the one JSON text of this content: sorted keys, no spaces, no NaN."""
        return canonical_json(self.model_dump(mode="json"))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON, prefixed `sha256:`."""
        return digest_of(self.canonical_json())

    @classmethod
    def from_object(cls, value: object, *, source: str | None = None) -> Self:
        """Return the document that `value` (parsed JSON) holds; raises InvalidDocument naming the field by path."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise invalid_document(cls.document_name, error, source=source) from error

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Return the document in a JSON file; raises InvalidDocument for an unreadable, foreign or invalid one."""
        return cls.from_object(read_json(path), source=str(path))

    def save(self, path: Path | str) -> None:
        """Write the document to `path`, whole or not at all."""
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces; raises ValueError for NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(text: str) -> str:
    """Return `sha256:` and the hex digest of `text`."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def invalid_document(name: str, error: ValidationError, *, source: str | None = None) -> InvalidDocument:
    """Return one error for all that pydantic found: field by path, the value given, what is wanted."""
    found = error.errors(include_url=False, include_context=False)
    # A default made from other fields fails with them; the fields themselves say why.
    details = [item for item in found if item["type"] != "default_factory_not_called"] or found
    lines = [f"{field_path(item['loc'])}: {item['msg']} (got {_shorten(item['input'])})" for item in details[:8]]
    if len(details) > 8:
        lines.append(f"and {len(details) - 8} more")
    where = f"{source}: not a valid {name}" if source else f"not a valid {name}"
    return InvalidDocument(
        f"{where}: " + "; ".join(lines),
        field=field_path(details[0]["loc"]),
        hint=f"`stagewright schema {name}` prints the JSON Schema",
    )


def field_path(location: tuple[int | str, ...]) -> str:
    """Return a path such as `stages[2].degrees.tp`."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path or "(document)"


def read_json(path: Path | str) -> object:
    """Return the parsed JSON of a file; raises InvalidDocument with the path, the line and the reason."""
    target = Path(path)
    try:
        if target.stat().st_size > MAX_FILE_BYTES:
            raise InvalidDocument(f"{path}: {target.stat().st_size} bytes, the limit is {MAX_FILE_BYTES}")
        text = target.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDocument(f"{path}: cannot be read: {error}", hint="give the path of a JSON file") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InvalidDocument(f"{path}: not JSON: {error}", hint="is the file cut off, or of another kind?") from error


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it; raises InvalidDocument when the path is unwritable."""
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    except OSError as error:
        raise InvalidDocument(f"{path}: cannot be written: {error}", hint="give a writable path") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise InvalidDocument(f"{path}: cannot be written: {error}", hint="give a writable path") from error


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number a document may hold")


def _unique_keys(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice in one object")
        result[key] = value
    return result


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
