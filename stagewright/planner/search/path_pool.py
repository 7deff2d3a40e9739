"""The critical paths that are known of an order, as arrays that grow: what programs over cuts are made of.

A path counts forwards, input gradients and weight gradients of each stage, then a zero, then hops, int32 [3 S + 1 + H], as
`order.trace_back` does, and ends on a rank. What carried a bound last comes first; a path's name stays while its place changes.
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
    """Paths of one order, the first `number` of `counts` [room, 3 S + 1 + H], `ends` and `names` [room]."""

    def __init__(self, order: Order) -> None:
        self.num_stages = order.num_stages
        self.number = 0
        self.counts: Ints = np.zeros((_ROOM, 3 * order.num_stages + 1 + order.num_hops), dtype=np.int32)
        self.ends: Longs = np.zeros(_ROOM, dtype=np.int64)
        self.names: Longs = np.zeros(_ROOM, dtype=np.int64)
        self._num_named = 0

    def reserve(self, more: int) -> None:
        """Make room for more paths."""
        room = self.number + more
        if room > len(self.counts):
            grown = np.zeros((max(room, 2 * len(self.counts)), self.counts.shape[1]), dtype=np.int32)
            grown[: self.number] = self.counts[: self.number]
            self.counts = grown
            more_zeros = np.zeros(len(grown) - len(self.ends), dtype=np.int64)
            self.ends, self.names = np.concatenate((self.ends, more_zeros)), np.concatenate((self.names, more_zeros))

    def add(self, cut: Cut) -> None:
        """Add a path behind the others."""
        self.reserve(1)
        stages = 3 * self.num_stages
        self.counts[self.number, :stages] = cut.counts.ravel()
        self.counts[self.number, stages + 1 :] = cut.hops
        self.ends[self.number] = cut.end_rank
        self.grow_to(self.number + 1)

    def grow_to(self, number: int) -> None:
        """Take paths up to `number` that were written behind the known ones; each gets a name that it keeps."""
        new = number - self.number
        self.names[self.number : number] = self._num_named + np.arange(new)
        self._num_named += new
        self.number = number

    @property
    def next_name(self) -> int:
        """The name of the next path that is taken; those of all others are below."""
        return self._num_named

    def prefer(self, first: Longs, *, before: int, drops_new: bool) -> None:
        """Put the paths of some names first, then those from the name `before` on, then the older ones; MOST_KNOWN at most stay.

        `drops_new` leaves those from `before` on out, but for the first ones.
        """
        is_named = np.zeros(self._num_named, dtype=np.bool_)
        is_named[first] = True
        is_first = is_named[self.names[: self.number]]
        is_new = self.names[: self.number] >= before
        old = np.flatnonzero(~is_first & ~is_new)
        new = np.flatnonzero(~is_first & is_new)
        places = np.concatenate((np.flatnonzero(is_first), *([] if drops_new else [new]), old))[:MOST_KNOWN]
        for part in (self.counts, self.ends, self.names):
            part[: len(places)] = part[places]
        self.number = len(places)
