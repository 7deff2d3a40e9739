"""AdaPipe (Sun et al., ASPLOS 2024): each stage recomputes what its own memory demands, and boundaries even that out.

Inner, for stage d of D with layers [i, j) and D - d microbatches in flight: a 0/1 knapsack over computation units,

    max sum of fwd_u over kept units   s.t.  (D - d) sum of mem_u over kept units <= memory - static(i, j),

which leaves F = sum fwd and B = sum bwd + sum of fwd_u over dropped units. It is solved exactly over the levels each
layer offers, equal layers counted (`search.recompute`). Outer, from the last stage, a programme over (stage, first layer)
with tuples of warm-up, ending and bottleneck:

    W = F + max(W_next + B_next, (D - d - 1) F)
    E = B + max(E_next + F_next, (D - d - 1) B)
    M = max(M_next, F + B)
    T = W_0 + E_0 + (T_mb - D) M_0

O(D L^2) and the knapsacks. The inner problem is optimal; the outer one keeps, for each state, the tuple of least
W + E + (T_mb - D) M, so it is a heuristic where two tuples do not dominate each other. Messages are not in T.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from stagewright.planner.planners.range_cuts import Cut
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.problem import Partition

Floats = npt.NDArray[np.float64]


def partition_stages(forward_s: Floats, backward_s: Floats, num_microbatches: int) -> Cut | None:
    """Return the partition of least T by the tuple programme; None when nothing fits.

    Parameters
    ----------
    forward_s : [L + 1, L + 1], of each layer range.
    backward_s : [D, L + 1, L + 1], recomputation on each stage included; infinite where a range does not fit.
    """
    num_stages, size = len(backward_s), len(forward_s)
    rounds = max(num_microbatches - num_stages, 0)
    shape = (num_stages, size)
    warm, end, most = np.full(shape, np.inf), np.full(shape, np.inf), np.full(shape, np.inf)
    choice = np.zeros(shape, dtype=np.int64)
    last = num_stages - 1
    warm[last], end[last] = forward_s[:, -1], backward_s[last][:, -1]
    most[last] = warm[last] + end[last]
    choice[last] = size - 1
    for stage in range(last - 1, -1, -1):
        ahead = num_stages - 1 - stage
        own_f, own_b = forward_s, backward_s[stage]
        next_f = np.array([forward_s[k, choice[stage + 1, k]] for k in range(size)])
        next_b = np.array([backward_s[stage + 1][k, choice[stage + 1, k]] for k in range(size)])
        w = own_f + np.maximum((warm[stage + 1] + next_b)[None, :], ahead * own_f)
        e = own_b + np.maximum((end[stage + 1] + next_f)[None, :], ahead * own_b)
        m = np.maximum(most[stage + 1][None, :], own_f + own_b)
        choice[stage] = np.argmin(w + e + rounds * np.where(np.isfinite(m), m, 0.0), axis=1)
        at = (np.arange(size), choice[stage])
        warm[stage], end[stage], most[stage] = w[at], e[at], m[at]
    if not np.isfinite(warm[0, 0] + end[0, 0]):
        return None
    total = warm[0, 0] + end[0, 0] + rounds * most[0, 0]
    bounds = [0]
    for stage in range(num_stages):
        bounds.append(int(choice[stage, bounds[-1]]))
    return Cut(float(total), tuple(bounds))


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    cost = table.with_least_recompute(table.time_s, slack=1.25)
    if cost is None:
        return
    forward = np.where(np.isfinite(table.forward_s), table.forward_s, 0.0)
    found = partition_stages(table.forward_s, cost - forward[None], table.num_microbatches)
    if found is not None:
        partition = table.fitted(found.bounds)
        assert partition is not None
        yield found.value, partition


PLANNER = table_planner(
    "adapipe",
    "Sun et al., AdaPipe: Optimizing Pipeline Parallelism with Adaptive Recomputation and Partitioning, ASPLOS 2024",
    _solve_one,
    reach=Reach(tensor=True, experts=True, zero=(0, 1), axis_orders=True),
    lower_bound=lambda table: table.least_rate_s,
    objective="W + E + (T - D) M, seconds",
)
