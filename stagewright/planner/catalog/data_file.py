"""The catalogue's data files: JSON inside the package, parsed when asked for."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import TypeVar

from stagewright.planner.documents.document import Part

Entry = TypeVar("Entry", bound=Part)


def read_entries(name: str, key: str, entry: type[Entry]) -> tuple[Entry, ...]:
    """Return the validated entries of one data file."""
    text = resources.files(__package__).joinpath("data", f"{name}.json").read_text(encoding="utf-8")
    return tuple(entry.model_validate(item) for item in json.loads(text)[key])


def suggestion(wanted: str, known: Iterable[str]) -> str:
    """Return "did you mean X? " for the nearest known name, nothing when none is near."""
    nearest = difflib.get_close_matches(wanted, list(known), n=1, cutoff=0.4)
    return f"did you mean {nearest[0]}? " if nearest else ""


def shortened(names: Sequence[str], limit: int = 12) -> str:
    """Return some names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
