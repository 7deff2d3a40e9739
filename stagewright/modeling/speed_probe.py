"""How fast a processor computes right now: the seconds of a fixed piece of work.

A core of a shared host is given more or less of the chip from one second to the next (its sibling thread, the common
clock), by a third and more, and no counter of the guest shows it. Work beside the probe slows down with it: over windows
of two seconds on a virtual machine of two cores, a GPT's forward and backward followed a probe of matrix products for
four fifths of its time and copies for one with an exponent of 1.07, a Llama's with 0.87, while both moved by 30 %.
Probes are compared that had the same past: one right behind the model's work or a rest takes 2.3 ms where one right behind
another probe takes 2.05, so each is made behind the model's own work. What the other cores do meanwhile matters little (idle, a
model, its optimizer or another probe: 2.29 to 2.48 ms).

What the host takes of a core altogether is told to the guest (steal): `stolen_seconds`.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

_SIZE, _PRODUCTS = 256, 8
_COPIED = 2**20  # numbers, more than the caches near a core hold
_REPEATS = 3


def stolen_seconds() -> float:
    """Return the seconds that the host has taken from all processors while they had work; 0 where nobody counts them."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return int(fields[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


class SpeedProbe:
    """A fixed piece of work on the processor; about 7 ms on a core of 2023."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._factor = torch.randn(_SIZE, _SIZE, generator=generator)
        self._product = torch.empty(_SIZE, _SIZE)
        self._source = torch.zeros(_COPIED)
        self._target = torch.zeros(_COPIED)
        self.seconds()  # the first one finds its memory and its code

    def seconds(self) -> float:
        """Return the median seconds of a few repetitions, of the time that this thread had its core."""
        return statistics.median(self._once() for _ in range(_REPEATS))

    def _once(self) -> float:
        begin = time.thread_time()
        for _ in range(_PRODUCTS):
            torch.mm(self._factor, self._factor, out=self._product)
        self._target.copy_(self._source)
        return time.thread_time() - begin
