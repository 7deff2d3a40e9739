"""What was measured so far, kept on disk so that nothing is measured twice.

Two stores in one folder:

- The journal of a profile: one line for each finished measurement, flushed to the disk before the next begins. After a
  kill it holds everything but the measurement under way. A torn or altered line is left out, and counted.
- Cache entries: one file for each layer class and configuration, named by the digest of all that decides its numbers
  (device, versions, the layer's structure and code, shape, load). An entry holds its key and a digest of its content;
  one that does not fit is reported and measured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagewright.planner.documents.document import canonical_json, digest_of, write_text
from stagewright.planner.errors import InvalidDocument

Key = Mapping[str, object]


@dataclass(frozen=True)
class Record:
    """One finished measurement: its configuration, its kind and its numbers."""

    configuration: tuple[int, int, int]
    kind: str
    numbers: dict[str, Any]


class Journal:
    """Measurements of one profile in the order they were made; without a folder they are kept in memory only.

    `num_resumed` is how many an earlier run had left, `num_damaged` how many lines of it could not be read.
    """

    def __init__(self, folder: Path | None, key: Key, *, resume: bool) -> None:
        self.records: list[Record] = []
        self.num_damaged = 0
        self.num_resumed = 0
        self._path: Path | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{_name(key)}.jsonl"
        if resume:
            self._read(self._path)
        else:
            self._path.unlink(missing_ok=True)

    def add(self, record: Record) -> None:
        """Keep a finished measurement, on disk before this returns."""
        self.records.append(record)
        if self._path is None:
            return
        content = [list(record.configuration), record.kind, record.numbers]
        line = json.dumps([digest_of(canonical_json(content)), content])
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def of(self, configuration: tuple[int, int, int], kind: str) -> list[dict[str, Any]]:
        """Return the numbers of all measurements of one kind and configuration."""
        return [item.numbers for item in self.records if item.configuration == configuration and item.kind == kind]

    def close(self) -> None:
        """Forget the file: the profile is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            record = _record(line)
            if record is None:
                self.num_damaged += 1
            else:
                self.records.append(record)
        self.num_resumed = len(self.records)
        if self.num_damaged:
            kept = [line for line in lines if _record(line) is not None]
            write_text(path, "".join(line + "\n" for line in kept))


@dataclass
class EntryCache:
    """Finished numbers of layer classes by key; `damaged` names the entries that had to be thrown away."""

    folder: Path | None
    damaged: list[str] = field(default_factory=list)

    def get(self, key: Key) -> dict[str, object] | None:
        """Return the entry of a key, or None when there is none that is whole."""
        if self.folder is None:
            return None
        path = self.folder / f"{_name(key)}.json"
        if not path.is_file():
            return None
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            content = entry["content"]
            if entry["digest"] != digest_of(canonical_json(content)) or content["key"] != json.loads(
                canonical_json(key)
            ):
                raise ValueError("the digest does not fit the content")
            numbers = content["numbers"]
            if not isinstance(numbers, dict):
                raise ValueError("the numbers are no object")
        except (OSError, ValueError, KeyError, TypeError):
            self.damaged.append(path.name)
            return None
        return numbers

    def put(self, key: Key, numbers: Mapping[str, object]) -> None:
        """Keep numbers under a key; a folder that cannot be written is an error that names it."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidDocument(f"{self.folder}: the cache cannot be written: {error}", field="cache") from error
        content = {"key": dict(key), "numbers": dict(numbers)}
        document = {"digest": digest_of(canonical_json(content)), "content": content}
        write_text(self.folder / f"{_name(key)}.json", json.dumps(document) + "\n")


def _name(key: Key) -> str:
    return digest_of(canonical_json(dict(key))).removeprefix("sha256:")[:40]


def _record(line: str) -> Record | None:
    try:
        digest, content = json.loads(line)
        configuration, kind, numbers = content
        if digest != digest_of(canonical_json(content)):
            return None
        return Record((int(configuration[0]), int(configuration[1]), int(configuration[2])), str(kind), dict(numbers))
    except (ValueError, TypeError, IndexError):
        return None
