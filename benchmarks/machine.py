"""What every result file opens with: machine, date and command. No host name, no path."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import time
from pathlib import Path


def machine(command: str) -> dict[str, object]:
    """Return processor, cores, memory, versions, date and the command that makes the result again."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
    }


def cpu_seconds() -> float:
    """Return the processor seconds of this process and of its children that ended: a search works in forks too."""
    return time.process_time() + children_cpu_s()


def children_cpu_s() -> float:
    """Return the processor seconds of the processes that this one has waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
