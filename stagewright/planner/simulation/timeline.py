"""A timeline: when each action ran on each rank, and how much memory was live. Simulated and measured are the same type.

Two bubble conventions exist and are never mixed: idle over total (GPipe, DAPPLE, Chimera papers) and idle over ideal
(Megatron-LM); the zero-bubble papers put a rank's span (first start to last end) in place of the makespan. Every
metric's name says which one it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

COMPUTE_LANE, SEND_LANE, COLLECTIVE_LANE, HOST_LANE = range(4)
LANE_NAMES = ("compute", "send", "collective", "host")


@dataclass(frozen=True, eq=False)
class Timeline:
    """Spans of all ranks, sorted by (rank, lane, start).

    Parameters
    ----------
    source : "simulated" or "measured".
    num_ranks : ranks of the pipeline (or of the world, when measured there).
    rank, lane : int32 [num_spans]; lane is an index of LANE_NAMES.
    action : int32 [num_spans, 6], rows as in `schedule.Schedule.orders`.
    start_s, end_s : float64 [num_spans], seconds from the start of the iteration.
    memory_time_s, memory_bytes : for each rank, a step function: from time k on, that much is live. Empty when unknown.
    link_bytes : bytes by link class and collective, e.g. "p2p", "all-reduce/dp"; summed over ranks.
    critical_path : indices of spans on one longest path, in time order; empty when not traced.
    """

    source: Literal["simulated", "measured"]
    num_ranks: int
    rank: Ints
    lane: Ints
    action: Ints
    start_s: Floats
    end_s: Floats
    memory_time_s: tuple[Floats, ...] = ()
    memory_bytes: tuple[Floats, ...] = ()
    link_bytes: dict[str, float] = field(default_factory=dict)
    critical_path: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    @property
    def makespan_s(self) -> float:
        """Seconds from the first start to the last end over all ranks."""
        return float(self.end_s.max() - self.start_s.min()) if len(self.end_s) else 0.0

    def busy_s(self) -> Floats:
        """Seconds of compute on each rank, shape [num_ranks]."""
        compute = self.lane == COMPUTE_LANE
        seconds = self.end_s[compute] - self.start_s[compute]
        return np.bincount(self.rank[compute], weights=seconds, minlength=self.num_ranks).astype(np.float64)

    def span_s(self) -> Floats:
        """Seconds from the first start to the last end of compute on each rank, shape [num_ranks]."""
        first = np.full(self.num_ranks, np.inf)
        last = np.full(self.num_ranks, -np.inf)
        compute = self.lane == COMPUTE_LANE
        np.minimum.at(first, self.rank[compute], self.start_s[compute])
        np.maximum.at(last, self.rank[compute], self.end_s[compute])
        return np.where(np.isfinite(first), last - first, 0.0)

    @property
    def ideal_s(self) -> float:
        """Mean compute seconds of a rank: the step without idle time, so that both bubbles follow from it.

        bubble_over_total = 1 - ideal / makespan and bubble_over_ideal = makespan / ideal - 1, also where ranks differ.
        """
        return float(self.busy_s().mean()) if self.num_ranks else 0.0

    @property
    def bubble_over_total(self) -> float:
        """Idle over total, 1 - mean busy / makespan (GPipe, DAPPLE, Chimera)."""
        return 1.0 - float(self.busy_s().mean()) / self.makespan_s

    @property
    def bubble_over_ideal(self) -> float:
        """Idle over ideal, makespan / mean busy - 1 (Megatron-LM)."""
        return self.makespan_s / float(self.busy_s().mean()) - 1.0

    @property
    def longest_span_s(self) -> float:
        """Longest rank span (zero-bubble papers)."""
        return float(self.span_s().max(initial=0.0))

    @property
    def span_bubble_over_total(self) -> float:
        """Idle over total with the longest rank span in place of the makespan (zero-bubble papers)."""
        return 1.0 - float(self.busy_s().mean()) / self.longest_span_s

    def peak_memory(self) -> Floats:
        """Highest live memory of each rank, in the unit of the costs (bytes in a plan's timeline), shape [num_ranks]."""
        return np.array([float(values.max(initial=0.0)) for values in self.memory_bytes])
