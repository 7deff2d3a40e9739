"""The cores of this machine that this process may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Return how many there are, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def on_cores(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return what work makes of each item, in their order: pays where most of it is compiled code without the lock."""
    number = min(num_cores(), len(items))
    if number < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(work, items))
