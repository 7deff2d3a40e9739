"""One proof for many candidates: multipliers of cuts and memory rows, valid for every candidate of an order.

For lambda >= 0 with sum 1 over cuts of an order and mu >= 0 over its memory rows, every completion of every candidate
that shares the order obeys

    step >= sum_j lambda_j path_j(n, e) + sum_{r,v} mu_{r,v} (bytes_{r,v}(n, e) - capacity)
         >= const + sum_{s,k} c[s, k] n[s, k],    c[s, k] = the least over levels of time and priced bytes

and the least of the last line over stage sizes is a sum of sorted numbers: every inner stage holds a layer, every rank
between lo_r and hi_r layers of the longest run. No solver is trusted: the multipliers may come from anywhere. They come
from the linear program of one candidate and mostly close its siblings (other degrees, microbatch, ZeRO stage) as well.

m candidates, S stages, K runs: O(m S K) vector operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.candidate_costs import CandidateCosts, RankSlots
from stagewright.planner.search.order import Cut, Order

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Multipliers:
    """A convex combination of an order's cuts, and prices of bytes.

    Parameters
    ----------
    times : [3, S], how often F, I, W of each stage stand on the mean path.
    hops : [num_hops].
    tails : [D], share of the paths that end on each rank.
    bytes_s : [D, N], seconds for a byte of each rank's live vectors; zeros without memory rows.
    """

    times: Floats
    hops: Floats
    tails: Floats
    bytes_s: Floats

    @classmethod
    def of(cls, order: Order, slots: RankSlots, cuts: list[Cut], weights: Floats, bytes_s: Floats) -> Multipliers:
        """Return the combination of `cuts` with `weights`, which are scaled to sum 1."""
        share = np.maximum(weights, 0.0)
        total = float(share.sum())
        share = share / total if total > 0 else np.full(len(cuts), 1.0 / max(len(cuts), 1))
        times, hops = np.zeros((3, order.num_stages)), np.zeros(order.num_hops)
        tails = np.zeros(order.num_ranks)
        for cut, weight in zip(cuts, share, strict=True):
            times += weight * cut.counts
            hops += weight * cut.hops
            tails[cut.end_rank] += weight
        return cls(times, hops, tails, np.maximum(bytes_s, 0.0) / max(total, 1e-300) if total > 0 else bytes_s * 0.0)


@dataclass(frozen=True, eq=False)
class Members:
    """Candidates of one order side by side: the arrays of `CandidateCosts`, [m, ...].

    `low`, `high` are [m, D]: least and most layers of the longest run on each rank at the target.
    """

    length: Longs
    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    recompute_s: Floats
    kept_bytes: Floats
    late_bytes: Floats
    workspace_bytes: Floats
    state_bytes: Floats
    step_s: Floats
    hop_s: Floats
    latency_s: Floats
    replica_s: Floats
    replica_latency_s: Floats
    low: Floats
    high: Floats

    @classmethod
    def of(cls, costs: list[CandidateCosts], windows: list[tuple[Longs, Longs]]) -> Members:
        """Return the arrays of some candidates."""
        runs = [item.runs for item in costs]
        stages, kinds = costs[0].num_stages, costs[0].runs.num_runs

        def replica(item: CandidateCosts) -> Floats:
            return item.replica_s if len(item.replica_s) else np.zeros(kinds)

        def replica_latency(item: CandidateCosts) -> Floats:
            return item.replica_latency_s if len(item.replica_latency_s) else np.zeros(stages)

        return cls(
            runs[0].length,
            np.stack([row.forward_s for row in runs]),
            np.stack([row.input_grad_s for row in runs]),
            np.stack([row.weight_grad_s for row in runs]),
            np.stack([row.recompute_s for row in runs]),
            np.stack([row.kept_bytes for row in runs]),
            np.stack([row.late_bytes for row in runs]),
            np.stack([row.workspace_bytes for row in runs]),
            np.stack([row.state_bytes for row in runs]),
            np.stack([row.step_s for row in runs]),
            np.stack([item.least_hop_s for item in costs]),
            np.array([item.stage_latency_s for item in costs]),
            np.stack([replica(item) for item in costs]),
            np.stack([replica_latency(item) for item in costs]),
            np.stack([low for low, _ in windows]).astype(np.float64),
            np.stack([high for _, high in windows]).astype(np.float64),
        )

    def take(self, rows: Longs) -> Members:
        """Return some of the members."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Members(**{name: value if name == "length" else value[rows] for name, value in values.items()})


def dual_bounds(
    multipliers: Multipliers,
    members: Members,
    order: Order,
    slots: RankSlots,
    reach: Bools,
    *,
    levels: Bools,
    capacity_bytes: float,
    overhead_s: float,
    step_overhead_s: float,
) -> Floats:
    """Return the bound that the multipliers prove for each member, seconds, [m]."""
    forward, input_grad, weight_grad = multipliers.times
    price, kept_price, late_price, tail_share = _stage_prices(multipliers, order, slots)
    allowed = np.flatnonzero(levels)
    linear = (
        forward[None, :, None] * members.forward_s[:, None, :]
        + input_grad[None, :, None] * members.input_grad_s[:, None, :]
        + weight_grad[None, :, None] * members.weight_grad_s[:, None, :]
        + tail_share[None, :, None] * (members.step_s + members.replica_s)[:, None, :]
        + price[None, :, None] * members.state_bytes[:, None, :]
    )
    by_level = (
        input_grad[None, None, :, None] * members.recompute_s[:, allowed, None, :]
        + kept_price[None, None, :, None] * members.kept_bytes[:, allowed, None, :]
        + late_price[None, None, :, None] * members.late_bytes[:, allowed, None, :]
    )
    each = linear + by_level.min(axis=1)
    actions = forward.sum() + input_grad.sum() + (weight_grad.sum() if order.split else 0.0)
    constant = step_overhead_s + overhead_s * actions + members.hop_s @ multipliers.hops
    held = np.array([len(held) for held in order.slots], dtype=np.float64)
    constant = constant + members.latency_s * float(multipliers.tails @ held)
    constant = constant + members.replica_latency_s @ tail_share
    workspace = least_workspaces(members.workspace_bytes[:, allowed].min(axis=1), order, reach)
    rank_price = multipliers.bytes_s.sum(axis=1)
    constant = constant - (capacity_bytes - workspace) @ rank_price
    return np.asarray(constant + _least_assignment(each, members, order, reach))


def _stage_prices(multipliers: Multipliers, order: Order, slots: RankSlots) -> tuple[Floats, Floats, Floats, Floats]:
    """Return by stage: price of a state byte, of a kept byte before I, of one after, and share of tails, [S] each."""
    stages = order.num_stages
    state, kept, late, tail = (np.zeros(stages) for _ in range(4))
    for rank, held in enumerate(order.slots):
        row = multipliers.bytes_s[rank]
        for place, slot in enumerate(held):
            state[slot.stage] += row.sum()
            kept[slot.stage] += float(row @ slots.live[rank, :, 0, place])
            late[slot.stage] += float(row @ slots.live[rank, :, 1, place])
            tail[slot.stage] += multipliers.tails[rank]
    return state, kept, late, tail


def least_workspaces(workspace: Floats, order: Order, reach: Bools) -> Floats:
    """Return the least workspace of each rank: that of the cheapest run that can stand on each of its stages, [m, D]."""
    by_stage = np.where(reach[None], workspace[:, None, :], np.inf).min(axis=2)
    return np.stack([by_stage[:, [slot.stage for slot in held]].max(axis=1) for held in order.slots], axis=1)


def _least_assignment(each: Floats, members: Members, order: Order, reach: Bools) -> Floats:
    """Return the least of sum each . n over stage sizes, [m]; longest run by windows, the others to their best stage."""
    bulk = int(np.argmax(members.length))
    masked = np.where(reach[None], each, np.inf)
    total = np.zeros(len(each))
    for run, number in enumerate(members.length.tolist()):
        if run != bulk:
            total += number * masked[:, :, run].min(axis=1)
    column = masked[:, :, bulk]
    number = float(members.length[bulk])
    if order.num_replicas > 1:
        return np.asarray(total + number * column.min(axis=1))
    only = reach[:, bulk] & (reach.sum(axis=1) == 1)
    needed = only.astype(np.float64)
    if needed.sum() > number:
        return np.full(len(each), np.inf)
    total += np.where(only[None], column, 0.0).sum(axis=1)
    best = np.stack([column[:, [slot.stage for slot in held]].min(axis=1) for held in order.slots], axis=1)
    placed = np.array([needed[[slot.stage for slot in held]].sum() for held in order.slots])
    least = np.maximum(members.low - placed, 0.0)
    most = np.maximum(members.high - placed, least)
    finite = np.where(np.isfinite(best), best, 0.0)
    total += (finite * least).sum(axis=1)
    left = number - needed.sum() - least.sum(axis=1)
    sequence = np.argsort(best, axis=1)
    sorted_best = np.take_along_axis(best, sequence, axis=1)
    sorted_room = np.take_along_axis(most - least, sequence, axis=1)
    before = np.cumsum(sorted_room, axis=1) - sorted_room
    taken = np.clip(left[:, None] - before, 0.0, sorted_room)
    total += np.where(taken > 0, np.where(np.isfinite(sorted_best), sorted_best, 0.0) * taken, 0.0).sum(axis=1)
    # Windows that leave no assignment at all are a proof of their own.
    impossible = (left < -1e-9) | (left > sorted_room.sum(axis=1) + 1e-9)
    return np.where(impossible, np.inf, total)
