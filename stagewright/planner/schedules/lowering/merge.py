"""Adjacent I and W of one microbatch become a full backward B, which costs less than its halves (1 to 9 %).

A merged gradient leaves its stage only after the W, so a merge may lengthen the step: ZB-H1 merged everywhere is 1F1B.
A merge is *free* when the stage before would not start any earlier without it:

    start(consumer) >= end(W) + (arrival - end(I))

Then every start time stays valid with all free merges done at once, and the makespan does not grow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, REPLICA, SLICE, STAGE, Orders, Schedule
from stagewright.planner.simulation.network import Links, Shares, spread
from stagewright.planner.simulation.simulate import action_times

Merge = Literal["free", "all", "none"]

_SAME = [REPLICA, STAGE, MICROBATCH, SLICE]


def merge_backwards(
    schedule: Schedule,
    costs: StageCosts,
    *,
    which: Merge = "free",
    links: Links | None = None,
    shares: Shares | None = None,
) -> Schedule:
    """Return the schedule with adjacent I and W merged: none, all, or those that cannot lengthen the makespan."""
    pairs = [_adjacent_pairs(order) for order in schedule.orders]
    if which == "none" or not any(len(found) for found in pairs):
        return schedule
    if which == "all":
        return _merge(schedule, pairs)
    times = action_times(schedule, costs, links=links, shares=shares)
    merged = _merge(schedule, _free_pairs(schedule, times, pairs, _hops(schedule, links or Links())))
    if action_times(merged, costs, links=links, shares=shares)[1].max() > times[1].max() * (1 + 1e-12):
        return schedule  # a busy link was what held the consumer back
    return merged


def _adjacent_pairs(order: Orders) -> npt.NDArray[np.int64]:
    """Return where an I is followed by the W of the same microbatch, neither of them in a fused group."""
    if len(order) < 2:
        return np.zeros(0, dtype=np.int64)
    first, second = order[:-1], order[1:]
    match = (first[:, KIND] == Kind.I) & (second[:, KIND] == Kind.W)
    match &= (first[:, _SAME] == second[:, _SAME]).all(axis=1) & (first[:, FUSED] == 0) & (second[:, FUSED] == 0)
    match[1:] &= order[:-2, FUSED] == 0
    return np.flatnonzero(match)


def _hops(schedule: Schedule, links: Links) -> npt.NDArray[np.float64]:
    """Return the longest that a gradient may take from rank to rank, [num_ranks, num_ranks], 0 on the diagonal."""
    pairs = (schedule.num_ranks, schedule.num_ranks)
    size = links.boundary_bytes if links.gradient_bytes is None else links.gradient_bytes
    slowest = float(np.max(np.asarray(size), initial=0.0))
    hops = spread("latency_s", links.latency_s, pairs) + slowest / spread("bytes_per_s", links.bytes_per_s, pairs)
    np.fill_diagonal(hops, 0.0)
    return hops


def _free_pairs(
    schedule: Schedule,
    times: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    pairs: list[npt.NDArray[np.int64]],
    hops: npt.NDArray[np.float64],
) -> list[npt.NDArray[np.int64]]:
    start_s, end_s = times
    offsets = np.cumsum([0, *(len(order) for order in schedule.orders)])
    wanted: dict[tuple[int, ...], float] = {}  # start of each backward
    for rank, order in enumerate(schedule.orders):
        for index in np.flatnonzero(np.isin(order[:, KIND], (Kind.B, Kind.I))).tolist():
            key = tuple(order[index, _SAME].tolist())
            wanted[key] = min(float(start_s[offsets[rank] + index]), wanted.get(key, np.inf))
    sources: dict[int, list[int]] = {}
    for source, target in schedule.edges:
        sources.setdefault(target, []).append(source)
    free: list[npt.NDArray[np.int64]] = []
    for rank, found in enumerate(pairs):
        keep = [
            index
            for index in found.tolist()
            if _is_free(
                schedule.orders[rank][index].tolist(),
                float(end_s[offsets[rank] + index + 1]),
                [
                    (source, hops[rank, schedule.placement[:, source]])
                    for source in sources.get(int(schedule.orders[rank][index, STAGE]), [])
                ],
                wanted,
            )
        ]
        free.append(np.array(keep, dtype=np.int64))
    return free


def _is_free(
    row: list[int],
    end_of_weight_grad_s: float,
    sources: list[tuple[int, npt.NDArray[np.float64]]],
    wanted: dict[tuple[int, ...], float],
) -> bool:
    for source, hop_s in sources:
        keys = [(row[REPLICA], source, row[MICROBATCH], part) for part in {row[SLICE], -1}]
        starts = [wanted[key] for key in keys if key in wanted]
        if not starts or min(starts) < end_of_weight_grad_s + float(hop_s[row[REPLICA]]):
            return False
    return True


def _merge(schedule: Schedule, pairs: list[npt.NDArray[np.int64]]) -> Schedule:
    orders = []
    for order, found in zip(schedule.orders, pairs, strict=True):
        merged = order.copy()
        merged[found, KIND] = Kind.B
        orders.append(np.delete(merged, found + 1, axis=0))
    return replace(schedule, orders=tuple(orders))
