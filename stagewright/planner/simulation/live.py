"""Which activations are live together on a rank: the vectors that bound its memory for every activation size.

A rank's activation memory after any prefix of its order is sum_s live[s] * activation[s], with live[s] the microbatches
of stage s whose F ran and whose W (or B) did not. It is linear in the activation sizes, so the peak over the order is
the maximum over the prefixes, and prefixes that another one dominates in every stage may be dropped. What is left is
one vector for GPipe, 1F1B and ZB-H1, one or two for V shapes, 10 to 16 for interleaved 1F1B with 4 chunks on 8 ranks.
Independent of all times. O(N V S) for N actions, V vectors kept and S stages.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND, SLICE, STAGE, Schedule

Ints = npt.NDArray[np.int32]

_F, _B, _W = int(Kind.F), int(Kind.B), int(Kind.W)


def peak_live(schedule: Schedule) -> tuple[Ints, ...]:
    """Return, for each rank, the non-dominated vectors of live microbatches, int32 [num_vectors, num_stages].

    Replicas of a stage count together. In a sliced schedule the unit is one slice, 1 / num_slices of a microbatch.
    Vectors are in lexicographic order, greatest first.
    """
    vectors: list[Ints] = []
    for order in schedule.orders:
        local, column = np.unique(order[:, STAGE], return_inverse=True)
        kept = _peaks(np.ascontiguousarray(order), column.astype(np.int32), len(local), schedule.num_slices)
        full = np.zeros((len(kept), schedule.num_stages), dtype=np.int32)
        full[:, local] = kept
        vectors.append(full[np.lexsort(full.T[::-1])[::-1]])
    return tuple(vectors)


@njit(cache=True)
def _peaks(order: Ints, column: Ints, num_columns: int, num_slices: int) -> Ints:
    live = np.zeros(num_columns, dtype=np.int32)
    kept = np.zeros((16, num_columns), dtype=np.int32)
    count, rising = 0, False
    for index in range(len(order) + 1):
        change = 0
        if index < len(order):
            kind = order[index, KIND]
            change = 1 if kind == _F else (-1 if kind in (_B, _W) else 0)
        if rising and (change < 0 or index == len(order)):
            if count == len(kept):
                kept = np.concatenate((kept, np.zeros_like(kept)))
            count = _keep(kept, count, live)
            rising = False
        if change != 0:
            amount = num_slices if order[index, SLICE] < 0 else 1
            live[column[index]] += change * amount
            rising = rising or change > 0
    return kept[:count].copy()


@njit(cache=True, no_cpython_wrapper=True)
def _keep(kept: Ints, count: int, vector: Ints) -> int:
    """Add `vector` to the antichain unless dominated, drop what it dominates; return the new size."""
    for index in range(count):
        if (kept[index] >= vector).all():
            return count
    size = 0
    for index in range(count):
        if not (kept[index] <= vector).all():
            kept[size] = kept[index]
            size += 1
    kept[size] = vector
    return size + 1
