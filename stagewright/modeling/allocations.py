"""Every allocation on the CPU while something runs, in order, as torch's profiler reports it.

torch keeps the sizes of addresses past the watch that saw them lent, and reports a release of an address that was lent anew
meanwhile, unwatched, with the size of the old loan. So a release counts only of what was lent under the same watch; where an
address is lent twice, the release between went unseen (on a thread without the profiler) and counts as the second loan comes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile, record_function

_PREFIX = "stagewright."
_LOG_LEVEL = "KINETO_LOG_LEVEL"
_MEMORY = "[memory]"
_CPU = 0


class Change(NamedTuple):
    """Bytes allocated, or released where negative, at a time (us) on a thread."""

    time_us: float
    size: int
    thread: int


class Mark(NamedTuple):
    """What `mark` was around: its name, when it began and ended (us), and the thread."""

    name: str
    begin_us: float
    end_us: float
    thread: int


@dataclass(frozen=True)
class Watch:
    """Changes and marks of a watch, each in order of time."""

    changes: list[Change]
    marks: list[Mark]


def mark(name: str) -> record_function:
    """Return a context whose begin and end the watch around it notes."""
    return record_function(_PREFIX + name)


def watch_allocations(work: Callable[[], object]) -> Watch:
    """Run `work` under watch; what this thread and those of autograd allocate and release is seen."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    with tempfile.TemporaryDirectory(prefix="stagewright-trace-") as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    reported = [event for event in events if event.get("name") == _MEMORY and event["args"].get("Device Type") == _CPU]
    marked = [event for event in events if event.get("ph") == "X" and event["name"].startswith(_PREFIX)]
    marks = [
        Mark(event["name"].removeprefix(_PREFIX), event["ts"], event["ts"] + event["dur"], event["tid"])
        for event in sorted(marked, key=_time)
    ]
    return Watch(list(_changes(sorted(reported, key=_time))), marks)


def _time(event: dict[str, Any]) -> float:
    return float(event["ts"])


def _changes(events: Iterable[dict[str, Any]]) -> Iterator[Change]:
    lent: dict[int, int] = {}  # sizes by address
    for event in events:
        address, size = int(event["args"]["Addr"]), int(event["args"]["Bytes"])
        before = lent.pop(address, 0)
        if before:
            yield Change(_time(event), -before, event["tid"])
        if size > 0:
            lent[address] = size
            yield Change(_time(event), size, event["tid"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler's library from writing to standard error, unless the user has set how much it says."""
    if _LOG_LEVEL in os.environ:
        yield
        return
    os.environ[_LOG_LEVEL] = "99"
    try:
        yield
    finally:
        del os.environ[_LOG_LEVEL]
