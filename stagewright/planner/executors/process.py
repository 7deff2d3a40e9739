"""Parts in processes of this machine, one a core; the least step and a stop flag live in one manager process.

Every part writes its own least step and reads those of all, so that no two writes can race; reads are cached for
REFRESH_S, because a search asks at every candidate.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.executors.part import Part, search_part

REFRESH_S = 0.02
POLL_S = 0.05


@dataclass
class SharedStep:
    """The least step over all parts, through a mapping from part to its least step."""

    steps: MutableMapping[int, float]
    place: int
    own_s: float = float("inf")
    _seen_s: float = float("inf")
    _read_at: float = field(default=-1.0)

    def least_s(self) -> float:
        now = time.monotonic()
        if now - self._read_at > REFRESH_S:
            self._seen_s, self._read_at = least_of(self.steps), now
        return min(self.own_s, self._seen_s)

    def offer(self, step_s: float) -> None:
        if step_s < self.own_s:
            self.own_s = step_s
            self.steps[self.place] = step_s


def least_of(steps: Mapping[int, float]) -> float:
    """Return the least step of all parts; infinite before the first plan."""
    return min(steps.values(), default=float("inf"))


@dataclass
class StopFlag:
    """Whether the search is to end, read at most every REFRESH_S."""

    event: Event
    _read_at: float = -1.0
    _seen: bool = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._read_at > REFRESH_S:
            self._seen, self._read_at = self.event.is_set(), now
        return self._seen


class ProcessExecutor:
    """Runs parts in a pool of spawned processes."""

    def __init__(self, num_workers: int | None = None) -> None:
        self.num_workers = num_workers or os.cpu_count() or 1

    def run(self, parts: Sequence[Part], should_stop: Callable[[], bool]) -> Iterator[tuple[int, PlanOutcome]]:
        """Yield outcomes as they come; a stop reaches every part within REFRESH_S of its next check."""
        context = multiprocessing.get_context("spawn")
        with (
            context.Manager() as manager,
            ProcessPoolExecutor(min(self.num_workers, max(len(parts), 1)), mp_context=context) as pool,
        ):
            steps, event = manager.dict(), manager.Event()
            waiting = {
                pool.submit(search_part, part, SharedStep(steps, place), StopFlag(event)): place
                for place, part in enumerate(parts)
            }
            while waiting:
                if should_stop():
                    event.set()
                done, _ = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=lambda item: waiting[item]):
                    yield waiting.pop(future), future.result()
