"""The critical paths that are known of an order, as arrays that grow: what programs over cuts are made of.

A path counts forwards, input gradients and weight gradients of each stage, then a zero, then hops, int32 [3 S + 1 + H], as
`order.trace_back` does, and ends on a rank. What carried a bound last comes first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.order import Cut, Order

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

MOST_KNOWN = 512
_ROOM = 64


class PathPool:
    """Paths of one order, the first `number` of `counts` [room, 3 S + 1 + H] and `ends` [room]."""

    def __init__(self, order: Order) -> None:
        self.num_stages = order.num_stages
        self.number = 0
        self.counts: Ints = np.zeros((_ROOM, 3 * order.num_stages + 1 + order.num_hops), dtype=np.int32)
        self.ends: Longs = np.zeros(_ROOM, dtype=np.int64)

    def reserve(self, more: int) -> None:
        """Make room for more paths."""
        room = self.number + more
        if room > len(self.counts):
            grown = np.zeros((max(room, 2 * len(self.counts)), self.counts.shape[1]), dtype=np.int32)
            grown[: self.number] = self.counts[: self.number]
            self.counts = grown
            self.ends = np.concatenate((self.ends, np.zeros(len(grown) - len(self.ends), dtype=np.int64)))

    def add(self, cut: Cut) -> None:
        """Add a path behind the others."""
        self.reserve(1)
        stages = 3 * self.num_stages
        self.counts[self.number, :stages] = cut.counts.ravel()
        self.counts[self.number, stages + 1 :] = cut.hops
        self.ends[self.number] = cut.end_rank
        self.number += 1

    def prefer(self, first: Longs, *, before: int, drops_new: bool) -> None:
        """Put some paths first, then those from `before` on, then the older ones; at most MOST_KNOWN stay.

        `drops_new` leaves those from `before` on out, but for the first ones.
        """
        chosen = np.zeros(self.number, dtype=np.bool_)
        chosen[first] = True
        left = np.flatnonzero(~chosen)
        new, old = left[left >= before], left[left < before]
        places = np.concatenate((first, *([] if drops_new else [new]), old))[:MOST_KNOWN]
        self.counts[: len(places)], self.ends[: len(places)] = self.counts[places], self.ends[places]
        self.number = len(places)
