"""Which rows of costs another row of the same group undercuts in every column: one leader for each dominated row.

Rows are visited in order of their sums, so a leader stands before the rows it leads and is led by none. A column that is
equal everywhere decides nothing. Complexity: O(n k F) for k leaders a group; most comparisons end after a few columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


def leaders_of(features: Floats) -> Longs:
    """Return for each row of one group, [n], the row that costs no more in any column: itself where there is none."""
    scale = np.abs(features).max(axis=0, initial=0.0)
    used = np.flatnonzero(scale > 0.0)
    order = np.argsort((features[:, used] / scale[used]).sum(axis=1), kind="stable")
    leaders: Longs = _leaders(np.ascontiguousarray(features[:, used]), order)
    return leaders


@njit(cache=True)
def _leaders(features: Floats, order: Longs) -> Longs:
    count, width = features.shape
    leader = np.arange(count)
    kept = np.empty(count, dtype=np.int64)
    num_kept = 0
    for place in range(count):
        row = order[place]
        for index in range(num_kept):
            other = kept[index]
            below = True
            for column in range(width):
                if features[other, column] > features[row, column]:
                    below = False
                    break
            if below:
                leader[row] = other
                break
        if leader[row] == row:
            kept[num_kept] = row
            num_kept += 1
    return leader
