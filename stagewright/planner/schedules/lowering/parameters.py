"""UNSHARD and RESHARD for parameters that are sharded over the data-parallel group (ZeRO-3, FSDP).

Parameters of a stage are gathered before a run of its forwards, or of its backwards, and dropped after it. A run is a
maximal stretch of one rank's list over the same stage in the same direction; W needs no parameters, so it neither breaks
a run nor needs one. Breadth-first orders gather each chunk twice an iteration; where forwards and backwards alternate
every microbatch gathers twice, 2 T in all (`gather="microbatch"` says so literally, whatever the order).

Paper: Lamy-Poirier, Breadth-First Pipeline Parallelism, MLSys 2023.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, REPLICA, SLICE, STAGE, Orders, Schedule

Gather = Literal["run", "microbatch"]


def with_parameter_gathers(schedule: Schedule, *, gather: Gather = "run") -> tuple[Orders, ...]:
    """Return the orders with UNSHARD before and RESHARD after each run."""
    return tuple(_gather(order, gather) for order in schedule.orders)


def _gather(order: Orders, gather: Gather) -> Orders:
    needing = np.flatnonzero(np.isin(order[:, KIND], (Kind.F, Kind.B, Kind.I, Kind.R)))
    if not len(needing):
        return order
    rows = order[needing]
    key = np.stack((rows[:, REPLICA], rows[:, STAGE], (rows[:, KIND] == Kind.F).astype(np.int32)), axis=1)
    if gather == "microbatch":
        key = np.concatenate((key, rows[:, [MICROBATCH]]), axis=1)
    breaks = np.flatnonzero((key[1:] != key[:-1]).any(axis=1)) + 1
    first = needing[np.concatenate(([0], breaks))]
    last = needing[np.concatenate((breaks - 1, [len(needing) - 1]))]
    before, after = _outside_groups(order, first, last)
    rows = np.concatenate((_marks(order[last], Kind.RESHARD), _marks(order[first], Kind.UNSHARD)))
    return np.insert(order, np.concatenate((after, before)), rows, axis=0).astype(np.int32)


def _outside_groups(
    order: Orders, first: np.ndarray[tuple[int], np.dtype[np.int64]], last: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Return where to insert before `first` and after `last` without parting a fused group."""
    opens = np.ones(len(order) + 1, dtype=np.bool_)
    opens[1:] = np.append(order[:, FUSED], 0)[: len(order)] == 0
    starts = np.flatnonzero(opens)
    before = starts[np.searchsorted(starts, first, side="right") - 1]
    after = starts[np.searchsorted(starts, last + 1, side="left")]
    return before, after


def _marks(rows: Orders, kind: Kind) -> Orders:
    marks = rows.copy()
    marks[:, KIND], marks[:, FUSED], marks[:, SLICE], marks[:, MICROBATCH] = kind, 0, -1, -1
    return marks
