"""Reports of failed ranks, and which of several is the cause.

A rank that raises writes a report before it ends. A rank whose peer vanished raises too, in the midst of a message; such
a report is a consequence. The cause is, in this order: a rank that raised of its own, a process that ended without a
word, a rank that fell silent, a broken connection.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stagewright.planner.documents.document import write_text

OWN, DIED, SILENT, CONNECTION = range(4)
LOST = "lost"  # a file in the run's directory: the launcher has seen that a rank is lost


@dataclass(frozen=True)
class RankFailure:
    """One rank's failure.

    Parameters
    ----------
    rank : the rank that failed, which need not be the one that reports.
    cause : OWN, DIED, SILENT or CONNECTION.
    place : stage and action in words.
    kind, message, field, hint, exit_code : as those of a StagewrightError.
    """

    rank: int
    cause: int
    place: str
    message: str
    kind: str = "run-failed"
    field: str | None = None
    hint: str | None = None
    exit_code: int = 1
    time_s: float = 0.0

    def save(self, directory: Path, reporter: int) -> None:
        """Write the report."""
        write_text(directory / f"failure.{reporter}.json", json.dumps(asdict(self)))


def load_failures(directory: Path) -> dict[int, RankFailure]:
    """Return the reports in a run's directory by the rank that wrote them."""
    return {
        int(path.name.split(".")[1]): RankFailure(**json.loads(path.read_text()))
        for path in sorted(directory.glob("failure.*.json"))
    }


def first_cause(failures: Sequence[RankFailure]) -> RankFailure:
    """Return the failure that explains the others."""
    return min(failures, key=lambda failure: (failure.cause, failure.time_s, failure.rank))


def now() -> float:
    """Return the time that reports carry."""
    return time.monotonic()
