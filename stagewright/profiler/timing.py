"""Clocks and repetitions: how one thing is timed until its median can be trusted.

A device clock marks instants in the device's own order (CUDA events on the current stream, the processor's monotonic
clock on CPU) so that nothing waits while a measurement runs. Warm-up goes on until two halves of the latest calls
agree, not for a fixed count.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from stagewright.planner.errors import InvalidArgument

_CPU_FLUSH_BYTES = 2**27
_CUDA_FLUSH_BYTES = 2**28


def check_budget(budget_s: float) -> None:
    """Raise InvalidArgument for a time that measuring cannot take."""
    if not (math.isfinite(budget_s) and budget_s >= 0):
        raise InvalidArgument(
            f"budget {budget_s} s is no time", field="budget", hint="give seconds, 0 for the fewest measurements"
        )


class Clock(Protocol):
    """Marks instants on a device; two marks give seconds once the device is synchronised."""

    def mark(self) -> object:
        """Return a mark of now, in the order of the device's work."""

    def seconds(self, first: object, second: object) -> float:
        """Return the seconds from one mark to another; call `synchronize` before."""

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""


class CpuClock:
    """The processor's clock: wall time, or with `own_time` the time this thread had its core.

    Own time is what a run will see when nothing else wants the cores, even if something did while it was measured.
    """

    def __init__(self, *, own_time: bool = False) -> None:
        self._own_time = own_time

    def mark(self) -> object:
        return time.thread_time() if self._own_time else time.perf_counter()

    def seconds(self, first: object, second: object) -> float:
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first

    def synchronize(self) -> None:
        return None


class CudaClock:
    """CUDA events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> object:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, first: object, second: object) -> float:
        assert isinstance(first, torch.cuda.Event)
        assert isinstance(second, torch.cuda.Event)
        return float(first.elapsed_time(second)) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def clock_of(device: torch.device, *, own_time: bool = False) -> Clock:
    """Return the clock of a device; `own_time` matters on CPU only."""
    return CudaClock(device) if device.type == "cuda" else CpuClock(own_time=own_time)


def flush_of(device: torch.device) -> Callable[[], object]:
    """Return a call that leaves nothing of use in the device's caches, by writing more than they hold."""
    size = _CUDA_FLUSH_BYTES if device.type == "cuda" else _CPU_FLUSH_BYTES
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of some samples, in seconds."""

    median_s: float
    p20_s: float
    p80_s: float
    num_samples: int

    @property
    def relative_width(self) -> float:
        """(p80 - p20) / median; 0 when the median is 0."""
        return (self.p80_s - self.p20_s) / self.median_s if self.median_s > 0 else 0.0


def spread_of(samples_s: Sequence[float]) -> Spread:
    """Return the spread of at least one sample."""
    p20, p80 = np.percentile(np.asarray(samples_s, dtype=float), [20, 80])
    return Spread(statistics.median(samples_s), float(p20), float(p80), len(samples_s))


def is_stable(samples_s: Sequence[float], *, tolerance: float = 0.05, half: int = 3) -> bool:
    """Whether the medians of the latest `half` samples and of the `half` before them agree."""
    if len(samples_s) < 2 * half:
        return False
    earlier = statistics.median(samples_s[-2 * half : -half])
    later = statistics.median(samples_s[-half:])
    return abs(later - earlier) <= tolerance * earlier


def time_calls(
    work: Callable[[], object],
    clock: Clock,
    *,
    min_calls: int = 5,
    budget_s: float = 0.2,
    max_calls: int = 1000,
    inner: int = 1,
) -> Spread:
    """Return the spread of one call of `work`, warmed up until stable within a third of the budget.

    Each sample times `inner` calls in a row, for work too short for the clock.
    """
    warm_until = time.perf_counter() + budget_s / 3
    samples: list[float] = []
    while not is_stable(samples) and (not samples or time.perf_counter() < warm_until):
        samples.append(_time_once(work, clock, inner))
    samples = []
    until = time.perf_counter() + budget_s * 2 / 3
    while len(samples) < min_calls or (time.perf_counter() < until and len(samples) < max_calls):
        samples.append(_time_once(work, clock, inner))
    return spread_of(samples)


def _time_once(work: Callable[[], object], clock: Clock, inner: int) -> float:
    first = clock.mark()
    for _ in range(inner):
        work()
    last = clock.mark()
    clock.synchronize()
    return clock.seconds(first, last) / inner
