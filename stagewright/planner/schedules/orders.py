"""Order arrays from columns: how generators write a rank's actions without a loop over them.

The pattern most schedules share is *k forwards, then alternate, then the rest of the backwards*. With n units of work
and k of them forwarded first, forward i stands at position

    i                    for i < k
    2 i - k + 1          otherwise
and backward j at
    2 j + k              for j < n - k
    n + j                otherwise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, STAGE, Orders

Ints = npt.NDArray[np.int32]
Column = Ints | int


def order_of(kind: Column, stage: Column, microbatch: Ints, *, slice_index: Column = -1, replica: Column = 0) -> Orders:
    """Return the order array with these columns, nothing fused; `microbatch` gives the length."""
    order = np.zeros((len(microbatch), 6), dtype=np.int32)
    order[:, KIND] = kind
    order[:, REPLICA] = replica
    order[:, STAGE] = stage
    order[:, MICROBATCH] = microbatch
    order[:, SLICE] = slice_index
    return order


def alternate(forwards: Ints, backwards: Ints, num_warmup: int) -> Ints:
    """Return `num_warmup` forwards, then a backward and a forward in turn, then the remaining backwards.

    Rows of orders, or letters of words: whatever the two hold.
    """
    count = len(forwards)
    warmup = min(max(num_warmup, 1), count)
    unit = np.arange(count)
    order = np.empty((2 * count, *forwards.shape[1:]), dtype=np.int32)
    order[np.where(unit < warmup, unit, 2 * unit - warmup + 1)] = forwards
    order[np.where(unit < count - warmup, 2 * unit + warmup, count + unit)] = backwards
    return order


def one_stage_passes(stage: int, num_microbatches: int, *, replica: int = 0) -> tuple[Orders, Orders]:
    """Return forwards and full backwards of one stage, microbatches in order."""
    microbatch = np.arange(num_microbatches, dtype=np.int32)
    return (
        order_of(int(Kind.F), stage, microbatch, replica=replica),
        order_of(int(Kind.B), stage, microbatch, replica=replica),
    )
