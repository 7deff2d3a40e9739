"""What commands print: one JSON document on stdout, or text for people; progress and messages go to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


class ReportsProgress(Protocol):
    """What long work calls: the phase in words, how much is done, of how much, and what is known so far."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None: ...


def print_document(document: Mapping[str, object] | list[object]) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def console(*, stderr: bool = False) -> Console:
    """Return a rich console for stdout or stderr; it honours NO_COLOR and FORCE_COLOR."""
    from rich.console import Console

    width = None if (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ else 140
    return Console(stderr=stderr, highlight=False, width=width)


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[ReportsProgress]:
    """Show bars on stderr, one for each phase: live on a terminal, one line for each finished phase elsewhere."""
    if quiet:
        yield _silent
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    screen = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bars:
        tasks: dict[str, object] = {}
        finished: set[str] = set()

        def report(phase: str, done: int, total: int, note: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=max(total, 1))
            text = f"{phase}: {note}" if note else phase
            bars.update(tasks[phase], completed=done, total=max(total, 1), description=text)  # type: ignore[arg-type]
            if done >= total and not screen.is_terminal and phase not in finished:
                finished.add(phase)
                sys.stderr.write(f"{phase}: done{f', {note}' if note else ''}\n")

        yield report


def _silent(phase: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""


def seconds_text(seconds: float) -> str:
    """Return a duration for people: us, ms or s with four digits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.4g} us"
    return f"{seconds * 1e3:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"


def bytes_text(num_bytes: float) -> str:
    """Return a size for people: KiB, MiB or GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.4g} {unit}"
    return f"{num_bytes / 1024:.4g} KiB"
