"""The bytes of ranks at their live vectors as rows of a program over cuts, compiled."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


@njit(cache=True)
def add_bytes(
    stage: Longs, live: Floats, ranks: Longs, number: Longs, first_cell: Longs, run_of: Longs, raised: Longs,
    kept: Floats, late: Floats, state: Floats, base: int, levels: Longs, rows: Floats,
) -> None:  # fmt: skip
    """Add to `rows` [M, n], one for each of the first `number` [D] live vectors of some ranks, what layers hold there.

    `stage` [D, V] and `live` [D, N, 2, V] are a rank's slots (`candidate_costs.RankSlots`). Column 1 + c is the layers of cell c
    at level `base`; those of stage s are cells `first_cell[s]` up to `first_cell[s + 1]`, of runs `run_of`. Column `raised[p, c]` is
    the layers of cell c that are raised to `levels[p]`. `kept` and `late` [3, K] are bytes by level and run, `state` [K].
    """
    at = 0
    for rank in ranks:
        for vector in range(number[rank]):
            row = rows[at]
            at += 1
            for place in range(stage.shape[1]):
                here = stage[rank, place]
                if here < 0:
                    continue
                early, behind = live[rank, vector, 0, place], live[rank, vector, 1, place]
                for cell in range(first_cell[here], first_cell[here + 1]):
                    run = run_of[cell]
                    held = early * kept[base, run] + behind * late[base, run]
                    row[1 + cell] += state[run] + held
                    for position in range(len(levels)):
                        raised_to = early * kept[levels[position], run] + behind * late[levels[position], run]
                        row[raised[position, cell]] += raised_to - held
