"""The cores of this machine that this process may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Return how many there are, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _helpers() -> ThreadPoolExecutor:
    """Return the threads that help, kept because starting one takes as long as many a piece of work."""
    return ThreadPoolExecutor(max(num_cores() - 1, 1), thread_name_prefix="on_cores")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def on_cores(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return what work makes of each item, in their order: pays where most of it is compiled code without the lock.

    The calling thread takes items too, and the others only where they are idle.
    """
    number = min(num_cores(), len(items))
    if number < 2:
        return [work(item) for item in items]
    found: dict[int, Result] = {}
    places = iter(range(len(items)))  # each is handed out once

    def take() -> None:
        for place in places:
            found[place] = work(items[place])

    helping = [_helpers().submit(take) for _ in range(number - 1)]
    try:
        take()
    finally:
        for _ in places:  # an error leaves the rest undone
            pass
        begun = [future for future in helping if not future.cancel()]
        wait(begun)
    for future in begun:
        future.result()
    return [found[place] for place in range(len(items))]
