"""Rows put into the lists of all ranks at simulated instants, in one order that every rank agrees on.

Row x of a rank is in the past of instant t when its end is at most t. A new row with instant t goes behind the past of
t; new rows of one rank are ordered by (t, tie). Two ranks that both get rows for instants t1 <= t2 (with equal ties)
therefore hold them in the same order, which is what in-order channels need: see `simulation.nccl`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.schedule import Orders, Schedule

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


class NewRows(NamedTuple):
    """Rows to insert: rank [n], instant_s [n], tie [n] for equal instants, and the rows [n, 6]."""

    rank: Ints
    instant_s: Floats
    tie: Longs
    rows: Orders

    @classmethod
    def join(cls, parts: list[NewRows]) -> NewRows:
        """Return all parts as one."""
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def insert_rows(schedule: Schedule, past_s: Floats, new: NewRows) -> tuple[Orders, ...]:
    """Return the orders with the new rows; `past_s` is when each old row is over, by row of all ranks in turn."""
    orders: list[Orders] = []
    start = 0
    for rank, order in enumerate(schedule.orders):
        mine = np.flatnonzero(new.rank == rank)
        mine = mine[np.lexsort((new.tie[mine], new.instant_s[mine]))]
        over = np.maximum.accumulate(past_s[start : start + len(order)])
        place = np.searchsorted(over, new.instant_s[mine], side="right")
        orders.append(np.insert(order, place, new.rows[mine], axis=0).astype(np.int32))
        start += len(order)
    return tuple(orders)
