"""What an exporter returns: files by name, and what the format could not say, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LossStatus = Literal["exact", "approximated", "dropped"]


@dataclass(frozen=True)
class Loss:
    """How one field of the plan came through; `note` says what the file holds instead."""

    field: str
    status: LossStatus
    note: str = ""


@dataclass(frozen=True)
class Exported:
    """Files by name, and every field's fate."""

    files: Mapping[str, str]
    losses: tuple[Loss, ...]

    @property
    def is_exact(self) -> bool:
        return all(loss.status == "exact" for loss in self.losses)
