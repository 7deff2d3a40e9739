"""DHelix: two microbatches as strands of a helix on one rank, the forward of one beside the backward of the other.

The model is folded into a V, so that both strands use the same weights, and the order is DualPipeV's with its fused
F&B pairs. How long a pair takes follows from its operators: `paired_s` walks the forward's and the backward's operators
and at each step runs one of either alone or one of each together,

    T(i, j) = min( T(i - 1, j) + f_i,  T(i, j - 1) + b_j,  T(i - 1, j - 1) + pair[i, j] ),

with pair[i, j] from a profiled overlap table. O(n m), exact for strands whose operators keep their order. The result is
the simulator's `Shares.overlap_s`.

Paper: Wang et al., Hiding Communication Cost in Distributed LLM Training via Micro-batch Co-execution, 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.dualpipe_v import dualpipe_v
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.schedule import Schedule

Floats = npt.NDArray[np.float64]


def dhelix(request: ScheduleRequest) -> Schedule:
    """Return the folded order with fused pairs."""
    fused = replace(request, parameters={"fused": 1, **request.parameters})
    return replace(dualpipe_v(fused), name="dhelix")


def paired_s(forward_s: Sequence[float], backward_s: Sequence[float], pair_s: Floats) -> float:
    """Return the shortest co-execution of two strands; `pair_s` is [forward operators, backward operators]."""
    rows, columns = len(forward_s), len(backward_s)
    least = np.full((rows + 1, columns + 1), np.inf)
    least[0, 0] = 0.0
    for i in range(rows + 1):
        for j in range(columns + 1):
            if i:
                least[i, j] = min(least[i, j], least[i - 1, j] + forward_s[i - 1])
            if j:
                least[i, j] = min(least[i, j], least[i, j - 1] + backward_s[j - 1])
            if i and j:
                least[i, j] = min(least[i, j], least[i - 1, j - 1] + pair_s[i - 1, j - 1])
    return float(least[rows, columns])


FAMILY = ScheduleFamily(
    "dhelix",
    "Wang et al., Hiding Communication Cost in Distributed LLM Training via Micro-batch Co-execution, 2024",
    dhelix,
    split_backward=True,
    default_chunks=2,
    constraint="T is at least 2 D, which fills both directions",
)
