"""Contiguous stages on the ranks of one pipeline: the interval dynamic programme for single-chunk schedules.

For rank r and layers [i, j) let t = F + I + W of the range with the least recomputation that fits the rank's live
microbatches (`recompute`), and head(i) the seconds of the layers before i. Two path bounds hold for every partition
(T microbatches, D ranks, hops c_s between ranks s and s + 1):

    P_r = head(i) + 2 sum_{s<r} c_s + T t                             the last gradient goes up to rank 0
    Q_r = headF(i) + sum_{s<r} c_s + T t + tail(i, j)                 the path ends on rank r, whose tail follows
    C_r = head(i) + (T - D + 1 + r) t + 2 rest(j) + hops              1F1B with T > D

P_r and Q_r hold for any synchronous order with fused backwards. Recomputation outside the range and rank 0's tail are
left out, so all stay lower bounds. The programme minimises their maximum exactly,

    V(r, i) = min over j of max(LB_r(i, j), V(r + 1, j)),

O(D L^2) ranges. Its value is a lower bound on the simulated step of every partition; its partition is the candidate's
first incumbent. For GPipe the loads themselves decide, and P_r is what the programme uses. Papers: DAPPLE (Fan et al.,
PPoPP 2021) for P_r; the bound C_r follows the path down, back up to r, round r, and down again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.layer_costs import LayerCosts
from stagewright.planner.search.order import Order
from stagewright.planner.search.pipeline_costs import Wiring
from stagewright.planner.search.recompute import LayerGroup, Recomputation, least_recompute

Floats = npt.NDArray[np.float64]


@dataclass(eq=False)
class Ranges:
    """Layer ranges of a configuration: prefix sums, classes, and the least recomputation of each range on each rank."""

    costs: LayerCosts
    order: Order
    capacity_bytes: float
    levels: tuple[int, ...]
    _known: dict[tuple[object, ...], Recomputation | None] = field(default_factory=dict)

    @cached_property
    def time_before(self) -> Floats:
        """Seconds of F, I and W of the layers before each, [L + 1]."""
        return np.concatenate((np.zeros(1), np.cumsum(self.costs.time_s)))

    @cached_property
    def forward_before(self) -> Floats:
        return np.concatenate((np.zeros(1), np.cumsum(self.costs.forward_s)))

    @cached_property
    def static_before(self) -> Floats:
        return np.concatenate((np.zeros(1), np.cumsum(self.costs.static_bytes)))

    @cached_property
    def step_before(self) -> Floats:
        return np.concatenate((np.zeros(1), np.cumsum(self.costs.step_s)))

    @cached_property
    def class_of(self) -> list[int]:
        """Class of each layer: layers with equal bytes and seconds are alike."""
        costs = self.costs
        workspace = costs.workspace_of(self.order)
        rows = np.vstack((costs.recompute_s, costs.kept_bytes, costs.late_bytes, workspace)).T
        _, index = np.unique(rows, axis=0, return_inverse=True)
        return [int(value) for value in np.ravel(index)]

    def least(self, rank: int, first: int, end: int) -> Recomputation | None:
        """Return the least recomputation with which layers [first, end) fit on `rank`; None when they never fit."""
        classes = tuple(sorted(self.class_of[first:end]))
        budget = self.capacity_bytes - float(self.static_before[end] - self.static_before[first])
        live = self.order.live[rank]
        key = (live.tobytes(), classes, round(budget, 3))
        if key not in self._known:
            groups = [self._group(kind, classes.count(kind), live) for kind in sorted(set(classes))]
            self._known[key] = least_recompute(groups, np.full(len(live), budget))
        return self._known[key]

    def levels_of(self, found: Recomputation, first: int, end: int) -> list[int]:
        """Return the level of each layer of a range under a recomputation; stronger levels come first."""
        classes = self.class_of[first:end]
        left = {
            kind: [level for level, count in zip(self.levels, counts, strict=True) for _ in range(count)]
            for kind, counts in zip(sorted(set(classes)), found.counts, strict=True)
        }
        return [left[kind].pop() for kind in classes]

    def _group(self, kind: int, count: int, live: Floats) -> LayerGroup:
        layer, costs, levels = self.class_of.index(kind), self.costs, list(self.levels)
        kept = costs.kept_bytes[levels, layer]
        late = costs.late_bytes[levels, layer]
        return LayerGroup(
            count,
            costs.recompute_s[levels, layer],
            live[:, 0, :1] * kept[None, :] + live[:, 1, :1] * late[None, :],
            costs.workspace_of(self.order)[levels, layer],
        )


@dataclass(frozen=True)
class IntervalSolution:
    """A partition that minimises the larger path bound, the bound's value, and the levels of its layers."""

    bound_s: float
    bounds: tuple[int, ...]
    levels: tuple[int, ...]


def solve_intervals(
    ranges: Ranges, wiring: Wiring, *, overhead_s: float = 0.0, below_s: float = np.inf
) -> IntervalSolution | None:
    """Return the partition of least path bound; None when nothing fits, or nothing has a bound below `below_s`.

    `overhead_s` is added to every action. Every stage but the first and the last holds at least one layer; these two
    hold one as well when there is one rank.
    """
    order = ranges.order
    num_layers, num_ranks = ranges.costs.num_layers, order.num_ranks
    value = np.full((num_ranks + 1, num_layers + 1), np.inf)
    choice = np.zeros((num_ranks + 1, num_layers + 1), dtype=np.int64)
    value[num_ranks, num_layers] = 0.0
    hops = _least_hops(ranges, wiring)
    for rank in range(num_ranks - 1, -1, -1):
        latest = num_layers - (num_ranks - 1 - rank)
        starts = [0] if rank == 0 else range(rank, latest)
        for first in starts:
            for end in range(first + 1, latest + 1) if rank < num_ranks - 1 else (num_layers,):
                after = value[rank + 1, end]
                if after >= min(value[rank, first], below_s):
                    continue
                bound = range_bound(ranges, rank, first, end, hops, overhead_s, without_recompute=True)
                if max(bound, after) >= min(value[rank, first], below_s):
                    continue
                bound = max(after, range_bound(ranges, rank, first, end, hops, overhead_s))
                if bound < min(value[rank, first], below_s):
                    value[rank, first], choice[rank, first] = bound, end
    if not np.isfinite(value[0, 0]):
        return None
    bounds = [0]
    for rank in range(num_ranks):
        bounds.append(int(choice[rank, bounds[-1]]))
    levels: list[int] = []
    for rank in range(num_ranks):
        found = ranges.least(rank, bounds[rank], bounds[rank + 1])
        assert found is not None
        levels += ranges.levels_of(found, bounds[rank], bounds[rank + 1])
    return IntervalSolution(float(value[0, 0]), tuple(bounds), tuple(levels))


def range_bound(
    ranges: Ranges,
    rank: int,
    first: int,
    end: int,
    hops: Floats,
    overhead_s: float,
    *,
    without_recompute: bool = False,
) -> float:
    """Return the larger of P_r and C_r for layers [first, end) on `rank`; infinite when they do not fit."""
    order, time = ranges.order, ranges.time_before
    num_ranks, microbatches = order.num_ranks, order.key.num_microbatches
    pair = 2.0 * overhead_s
    extra = 0.0
    if not without_recompute:
        found = ranges.least(rank, first, end)
        if found is None:
            return float("inf")
        extra = found.seconds
    own = float(time[end] - time[first]) + extra + pair
    head = float(time[first]) + rank * pair
    tail = float(ranges.step_before[end] - ranges.step_before[first]) + ranges.costs.stage_latency_s
    forward = float(ranges.forward_before[first]) + rank * overhead_s
    way = float(hops[:rank].sum())
    bound = microbatches * own + max(head + 2.0 * way, forward + way + tail)
    if order.key.family == "1f1b" and microbatches > num_ranks:
        rest = float(time[-1] - time[end]) + (num_ranks - 1 - rank) * pair
        rounds = microbatches - num_ranks + 1 + rank
        bound = max(bound, head + rounds * own + 2.0 * rest + 2.0 * way + 4.0 * float(hops[rank:].sum()))
    return bound


def _least_hops(ranges: Ranges, wiring: Wiring) -> Floats:
    """Return for each boundary the seconds of the smallest tensor that could cross it, [D - 1]."""
    inner = ranges.costs.cut_bytes[1:-1]
    least = float(inner.min()) if len(inner) else 0.0
    return np.array([wiring.line(int(a), int(b)).seconds(least) for a, b in ranges.order.hop_pairs])
