"""A bound of a candidate by the multipliers of another candidate of its order, without a linear program.

Multipliers lambda >= 0 that sum to 1 make one mean path of the paths of an order, and its length bounds the step from below at
every completion of every candidate. With n[s, k] layers of run k on stage s, c[s, k] their seconds along the mean path, v_r how
often it visits rank r at least, and rho_r(n) the least recomputation of n layers of the largest class on rank r,

    step >= constant + min over n of sum_{s, k} c[s, k] n[s, k] + sum_r v_r rho_r(n_r)

    s.t. sum_s n[s, k] = N_k, the largest class at least 1 where it is alone, lo_r <= n_r <= hi_r of it on rank r

Small classes take the cheapest stage that they reach. For the largest class, rank r with n_r layers costs what its stages of one
layer cost and n_r less their number times its cheapest stage; ranks are combined by a programme over layers placed so far,
whole layers, O(D N (hi - lo)). Where two candidates differ little, the best multipliers of the one close the other. It is
a relaxation whatever the multipliers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.caps import recompute_floors
from stagewright.planner.search.cut_program import MOST_LISTED
from stagewright.planner.search.path_pool import PathPool

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class MeanPath(NamedTuple):
    """A mean of paths: visits of forwards, input and weight gradients [3, S], hops, share that ends on each rank [D], and
    the least visits of each rank [D]."""

    counts: Floats
    hops: Floats
    ends: Floats
    visits: Floats


def mean_path(costs: CandidateCosts, pool: PathPool, weights: Floats) -> MeanPath | None:
    """Return the mean of a pool's paths with weights that need not sum to 1; None where they are all zero."""
    total = float(weights.sum())
    if total <= 0.0:
        return None
    chosen = np.flatnonzero(weights)
    share, stages = weights[chosen] / total, 3 * costs.num_stages
    paths = pool.counts[chosen]
    counts = paths[:, :stages].reshape(len(chosen), 3, -1).astype(np.float64)
    ends = np.zeros(costs.order.num_ranks)
    np.add.at(ends, pool.ends[chosen], share)
    hops = share @ paths[:, stages + 1 :]
    return MeanPath(np.tensordot(share, counts, axes=1), hops, ends, share @ _least_visits(costs, counts[:, 1]))


def _least_visits(costs: CandidateCosts, input_grad: Floats) -> Floats:
    """Return how often paths of these input gradients [n, S] pay a rank's recomputation at least, [n, D]."""
    place = costs.slots.stage
    visits = np.where(place >= 0, input_grad[:, np.maximum(place, 0)], np.inf).min(axis=2)
    return np.asarray(visits / costs.order.num_replicas)


def bound_by(
    costs: CandidateCosts, paths: Sequence[MeanPath], rank_layers: tuple[Longs, Longs], target_s: float
) -> float:
    """Return the first bound of `target_s` that a mean path of the order gives, or the largest; one replica only.

    `rank_layers` are the least and the most layers of the largest class on each rank, [D], [D].
    """
    runs, order = costs.runs, costs.order
    base = int(np.argmax(costs.levels))
    of_class = costs.classes.run_class
    bulk = np.asarray(of_class == of_class[costs.bulk_run])
    reach = costs.reach
    back_s = runs.input_grad_s + runs.recompute_s[base]
    held = costs.slots.held
    extra_s = _extra_recomputation(costs, rank_layers, base)
    best_s = 0.0
    for path in paths:
        forward, input_grad, weight_grad = path.counts
        each = (
            forward[:, None] * runs.forward_s + input_grad[:, None] * back_s + weight_grad[:, None] * runs.weight_grad_s
        )
        each += (path.ends @ held)[:, None] * runs.step_s
        actions = forward.sum() + input_grad.sum() + (weight_grad.sum() if order.split else 0.0)
        constant = float(path.hops @ costs.least_hop_s) + costs.step_overhead_s + costs.overhead_s * float(actions)
        constant += float(costs.constant_tail_s @ path.ends) + costs.stage_latency_s * float((path.ends @ held).sum())
        small = np.where(reach, each, np.inf).min(axis=0)[~bulk] @ runs.length[~bulk]
        large = _least_of_ranks(
            each[:, costs.bulk_run],
            order.placement[0].astype(np.int64),
            reach[:, bulk].any(axis=1),
            ~reach[:, ~bulk].any(axis=1),
            *rank_layers,
            extra_s,
            path.visits,
            int(runs.length[bulk].sum()),
        )
        best_s = max(best_s, constant + float(small) + float(large))
        if best_s >= target_s:
            break
    return best_s


def _extra_recomputation(costs: CandidateCosts, rank_layers: tuple[Longs, Longs], base: int) -> Floats:
    """Return the least seconds above the weakest level's with low, low + 1, ... layers of the largest class on each rank."""
    low, high = rank_layers
    width = int((high - low).max(initial=0)) + 1
    if int(costs.levels.sum()) == 1 or int(high.max(initial=0)) > MOST_LISTED:
        return np.zeros((len(low), width))
    floors = recompute_floors(costs.rank_tables, low, high)
    each = float(costs.runs.recompute_s[base, costs.bulk_run])
    return np.asarray(np.maximum(floors - each * (low[:, None] + np.arange(width)), 0.0))


@njit(cache=True)
def _least_of_ranks(
    each: Floats,
    rank_of: Longs,
    holds: Bools,
    alone: Bools,
    low: Longs,
    high: Longs,
    extra_s: Floats,
    visits: Floats,
    number: int,
) -> float:
    """Return the least seconds of `number` layers over ranks; `each` [S] is what one costs on a stage, infinite for none."""
    ranks = len(low)
    cheapest, sure_s = np.full(ranks, np.inf), np.zeros(ranks)
    sure = np.zeros(ranks, dtype=np.int64)
    for stage in range(len(each)):
        rank = rank_of[stage]
        if holds[stage]:
            cheapest[rank] = min(cheapest[rank], each[stage])
        if alone[stage]:
            sure[rank] += 1
            sure_s[rank] += each[stage]
    before = np.full(number + 1, np.inf)
    before[0] = 0.0
    most = 0
    for rank in range(ranks):
        after = np.full(number + 1, np.inf)
        for here in range(max(low[rank], sure[rank]), high[rank] + 1):
            more = here - sure[rank]
            seconds = sure_s[rank] + (more * cheapest[rank] if more > 0 else 0.0)
            if visits[rank] > 0.0:
                seconds += visits[rank] * extra_s[rank, here - low[rank]]
            for placed in range(min(most, number - here) + 1):
                after[placed + here] = min(after[placed + here], before[placed] + seconds)
        most += high[rank]
        before = after
    return float(before[number])
