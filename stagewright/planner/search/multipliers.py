"""A bound of a candidate by the multipliers of another candidate of its order, without a linear program.

Multipliers lambda >= 0 that sum to 1 make one mean path of the paths of an order, and its length bounds the step from below at
every completion of every candidate. With n[s, k] layers of run k on stage s, c[s, k] their seconds along the mean path, v_r how
often it visits rank r at least, and rho_r(n) the least recomputation of n layers of the largest class on rank r,

    step >= constant + min over n of sum_{s, k} c[s, k] n[s, k] + sum_r v_r rho_r(n_r)

    s.t. sum_s n[s, k] = N_k, the largest class at least 1 where it is alone, lo_r <= n_r <= hi_r of it on rank r

Small classes take the cheapest stage that they reach. For the largest class, rank r with n_r layers costs what its stages of one
layer cost and n_r less their number times its cheapest stage; ranks are combined by a programme over layers placed so far,
whole layers, O(D N (hi - lo)). Two ranks that hold both copies of the same stages count as one, which recomputes for both. Where
two candidates differ little, the best multipliers of the one close the other. It is a relaxation whatever the multipliers are.
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


def mean_path(costs: CandidateCosts, pool: PathPool, names: Longs, weights: Floats) -> MeanPath | None:
    """Return the mean of some of a pool's paths with weights [n] that need not sum to 1; None where there are none."""
    if not len(names):
        return None
    of_name = dict(zip(pool.names[: pool.number].tolist(), range(pool.number), strict=True))
    chosen = np.array([of_name[name] for name in names.tolist()])
    share, stages = weights / float(weights.sum()), 3 * costs.num_stages
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
    """Return the first bound of `target_s` that a mean path of the order gives, or the largest.

    `rank_layers` are the least and the most layers of the largest class on each rank, [D], [D]. Zero where ranks share some of
    their stages, but not all.
    """
    runs, order = costs.runs, costs.order
    groups = _groups(costs)
    if groups is None:
        return 0.0
    of_rank, of_stage = groups
    base = int(np.argmax(costs.levels))
    of_class = costs.classes.run_class
    bulk = np.asarray(of_class == of_class[costs.bulk_run])
    reach = costs.reach
    back_s = runs.input_grad_s + runs.recompute_s[base]
    held = costs.slots.held
    step_s, end_s = runs.step_s, costs.constant_tail_s + costs.stage_latency_s * held.sum(axis=1)
    if len(costs.replica_s):
        step_s, end_s = step_s + costs.replica_s, end_s + held @ costs.replica_latency_s
    low, high = _limits_of_groups(rank_layers, of_rank)
    if (low > high).any():
        return np.inf
    extra_s = _extra_recomputation(costs, rank_layers, base)
    best_s = 0.0
    for path in paths:
        forward, input_grad, weight_grad = path.counts
        each = (
            forward[:, None] * runs.forward_s + input_grad[:, None] * back_s + weight_grad[:, None] * runs.weight_grad_s
        )
        each += (path.ends @ held)[:, None] * step_s
        actions = forward.sum() + input_grad.sum() + (weight_grad.sum() if order.split else 0.0)
        constant = float(path.hops @ costs.least_hop_s) + costs.step_overhead_s + costs.overhead_s * float(actions)
        constant += float(end_s @ path.ends)
        small = np.where(reach, each, np.inf).min(axis=0)[~bulk] @ runs.length[~bulk]
        large = _least_of_groups(
            each[:, costs.bulk_run],
            of_stage,
            reach[:, bulk].any(axis=1),
            ~reach[:, ~bulk].any(axis=1),
            low,
            high,
            of_rank,
            rank_layers[0],
            extra_s,
            path.visits,
            int(runs.length[bulk].sum()),
        )
        best_s = max(best_s, constant + float(small) + float(large))
        if best_s >= target_s:
            break
    return best_s


def _groups(costs: CandidateCosts) -> tuple[Longs, Longs] | None:
    """Return the group of each rank, of those that hold the same stages, [D], and of each stage, [S].

    None where a rank holds a stage twice, or a stage stands in two groups.
    """
    placement = costs.order.placement.astype(np.int64)
    if len(placement) == 1:
        return np.arange(costs.order.num_ranks), placement[0]
    held = costs.slots.held
    of_rank = np.unique(held, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    of_stage = of_rank[placement[0]]
    return None if (held > 1.0).any() or (of_rank[placement] != of_stage).any() else (of_rank, of_stage)


def _limits_of_groups(rank_layers: tuple[Longs, Longs], of_rank: Longs) -> tuple[Longs, Longs]:
    """Return the least and the most layers of the largest class in each group of ranks that hold the same layers."""
    number = int(of_rank.max()) + 1
    low, high = np.zeros(number, dtype=np.int64), np.full(number, np.iinfo(np.int64).max)
    np.maximum.at(low, of_rank, rank_layers[0])
    np.minimum.at(high, of_rank, rank_layers[1])
    return low, high


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
def _least_of_groups(
    each: Floats,
    of_stage: Longs,
    holds: Bools,
    alone: Bools,
    low: Longs,
    high: Longs,
    of_rank: Longs,
    first: Longs,
    extra_s: Floats,
    visits: Floats,
    number: int,
) -> float:
    """Return the least seconds of `number` layers over groups of ranks, `low` to `high` in each.

    `each` [S] is what a layer costs on a stage, infinite for none; `extra_s` [D, n] the recomputation of `first` and more
    layers on a rank, `visits` [D] how often it counts.
    """
    groups = len(low)
    cheapest, sure_s = np.full(groups, np.inf), np.zeros(groups)
    sure = np.zeros(groups, dtype=np.int64)
    for stage in range(len(each)):
        group = of_stage[stage]
        if holds[stage]:
            cheapest[group] = min(cheapest[group], each[stage])
        if alone[stage]:
            sure[group] += 1
            sure_s[group] += each[stage]
    before = np.full(number + 1, np.inf)
    before[0] = 0.0
    most = 0
    for group in range(groups):
        after = np.full(number + 1, np.inf)
        for here in range(max(low[group], sure[group]), high[group] + 1):
            more = here - sure[group]
            seconds = sure_s[group] + (more * cheapest[group] if more > 0 else 0.0)
            for rank in range(len(of_rank)):
                if of_rank[rank] == group and visits[rank] > 0.0:
                    seconds += visits[rank] * extra_s[rank, here - first[rank]]
            for placed in range(min(most, number - here) + 1):
                after[placed + here] = min(after[placed + here], before[placed] + seconds)
        most += high[group]
        before = after
    return float(before[number])
