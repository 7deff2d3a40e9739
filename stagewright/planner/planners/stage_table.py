"""What every layer range of one configuration costs as a pipeline stage: the one table that named planners read.

`table[i, j]` speaks of layers [i, j) on one device of a rank, for one microbatch, 0 <= i < j <= L; entries with i >= j
are infinite. All but workspaces, which are maxima, are differences of prefix sums. The numbers are those of the scorer
(`layer_costs`, `wiring`), so a planner that is wrong about a plan is wrong by its own objective, not by other inputs.

In-flight counts are the planner's: a stage keeps `in_flight` times the kept bytes of its layers. Uniform levels
(`level`) recompute the whole stage; `least_recompute_s` is the exact knapsack over its layers (`search.recompute`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.memory_actions import streamed_states_s
from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.search.layer_costs import Configuration, LayerCosts
from stagewright.planner.search.problem import Candidate, Partition, Problem
from stagewright.planner.search.recompute import LayerGroup, Recomputation, least_recompute

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(eq=False)
class StageTable:
    """Costs of every layer range of a candidate's configuration.

    Parameters
    ----------
    offloaded : share of the optimizer's states on the host, streamed in for the step.
    """

    problem: Problem
    candidate: Candidate
    offloaded: float = 0.0
    _least: dict[tuple[object, ...], Recomputation | None] = field(default_factory=dict)

    @property
    def configuration(self) -> Configuration:
        return self.candidate.configuration

    @property
    def num_ranks(self) -> int:
        return self.configuration.num_ranks

    @property
    def num_microbatches(self) -> int:
        return self.configuration.num_microbatches

    @property
    def num_layers(self) -> int:
        return self.costs.num_layers

    @property
    def levels(self) -> tuple[int, ...]:
        """Recomputation levels that layers may take."""
        return self.problem.levels

    @property
    def room_bytes(self) -> float:
        """What a device has for states, activations and workspace."""
        return self.problem.capacity_bytes - self.problem.base_bytes

    @property
    def overhead_s(self) -> float:
        return self.problem.profile.action_overhead_s

    @cached_property
    def costs(self) -> LayerCosts:
        """Costs of each layer."""
        return self.problem.costs(self.configuration)

    @cached_property
    def hop_s(self) -> Floats:
        """Seconds of the message over a cut before each layer, between the two neighbours farthest apart, [L + 1]."""
        if self.num_ranks == 1:
            return np.zeros(self.num_layers + 1)
        wiring = self.problem.wiring(self.configuration)
        lines = {wiring.line(rank, rank + 1) for rank in range(self.num_ranks - 1)}
        hop = np.array([max(line.seconds(float(size)) for line in lines) for size in self.costs.cut_bytes])
        hop[[0, -1]] = 0.0
        return hop

    @cached_property
    def forward_s(self) -> Floats:
        return ranges_of(self.costs.forward_s) + self.overhead_s

    @cached_property
    def backward_s(self) -> Floats:
        """Input and weight gradients, without recomputation."""
        return ranges_of(self.costs.input_grad_s + self.costs.weight_grad_s) + self.overhead_s

    @cached_property
    def time_s(self) -> Floats:
        """Forward and backward, without recomputation."""
        return self.forward_s + self.backward_s

    @cached_property
    def reduction_s(self) -> Floats:
        """Once a step: gradients summed over the replicas."""
        return ranges_of(self.costs.tail_s) + self.costs.stage_latency_s

    @cached_property
    def step_s(self) -> Floats:
        """Once a step: gradients summed, optimizer run, its states streamed in."""
        plain = self.reduction_s + ranges_of(self.costs.optimizer_s)
        if not self.offloaded:
            return plain
        rate = self.problem.cluster.groups[0].device.host_bytes_per_s
        assert rate is not None
        return plain + streamed_states_s(1.0, rate) * ranges_of(self.offloaded * self.costs.state_bytes[2])

    @cached_property
    def static_bytes(self) -> Floats:
        """Parameters, gradients, optimizer."""
        return ranges_of(self.costs.static_bytes - self.offloaded * self.costs.state_bytes[2])

    @cached_property
    def parameter_bytes(self) -> Floats:
        return ranges_of(self.costs.state_bytes[0])

    @cached_property
    def in_hop_s(self) -> Floats:
        """Message into the range, [L + 1, 1]."""
        return self.hop_s[:, None]

    @cached_property
    def out_hop_s(self) -> Floats:
        """Message out of the range, [1, L + 1]."""
        return self.hop_s[None, :]

    @property
    def least_rate_s(self) -> float:
        """Seconds of a step in which all ranks are busy alike and nothing is recomputed: no slowest stage is faster."""
        return self.num_microbatches * float(self.costs.time_s.sum()) / self.num_ranks

    def in_flight(self, stage: int) -> int:
        """Return the microbatches that a stage of 1F1B keeps, min(T, D - stage)."""
        return min(self.num_microbatches, self.num_ranks - stage)

    def most_in_flight(self, level: int) -> Floats:
        """Return how many microbatches each range can keep at a level; below 1 where it does not fit at all."""
        free = self.room_bytes - self.static_bytes - self.workspace_bytes(level)
        kept = self.kept_bytes(level)
        with np.errstate(invalid="ignore", divide="ignore"):
            most = np.floor(np.where(free >= 0, free / np.where(kept > 0, kept, 1.0), -1.0))
        return np.where((kept <= 0) & (free >= 0), np.inf, np.nan_to_num(most, nan=-1.0, posinf=np.inf, neginf=-1.0))

    def partition(self, bounds: tuple[int, ...], level: int | None = None) -> Partition:
        """Return a partition with one level for all layers, the weakest allowed unless told."""
        return Partition(bounds, (self.levels[0] if level is None else level,) * self.num_layers)

    def fitted(self, bounds: tuple[int, ...]) -> Partition | None:
        """Return a partition with the least recomputation that fits each stage of 1F1B; None when one never fits."""
        levels: tuple[int, ...] = ()
        for stage, (first, end) in enumerate(pairwise(bounds)):
            if self.least(first, end, self.in_flight(stage)) is None:
                return None
            levels += self.least_levels(first, end, self.in_flight(stage))
        return Partition(bounds, levels)

    def recompute_s(self, level: int) -> Floats:
        """Return the seconds of recomputing whole ranges at a level."""
        return ranges_of(self.costs.recompute_s[level])

    def kept_bytes(self, level: int) -> Floats:
        """Return the bytes that one microbatch keeps."""
        return ranges_of(self.costs.kept_bytes[level])

    def workspace_bytes(self, level: int) -> Floats:
        """Return the highest temporary use of any layer of the range."""
        rows = self.costs.workspace_bytes[level]
        count = len(rows)
        table = np.full((count + 1, count + 1), np.inf)
        for first in range(count):
            table[first, first + 1 :] = np.maximum.accumulate(rows[first:])
        return table

    def peak_bytes(self, level: int, in_flight: float) -> Floats:
        """Return the bytes of ranges that keep `in_flight` microbatches at a level."""
        return self.static_bytes + in_flight * self.kept_bytes(level) + self.workspace_bytes(level)

    def fits(self, level: int, in_flight: float) -> Bools:
        """Tell which ranges fit a device."""
        return np.asarray(self.peak_bytes(level, in_flight) <= self.room_bytes)

    @cached_property
    def class_of(self) -> list[int]:
        """Class of each layer: layers with equal bytes and seconds are alike."""
        costs = self.costs
        rows = np.vstack((costs.recompute_s, costs.kept_bytes, costs.workspace_bytes)).T
        _, index = np.unique(rows, axis=0, return_inverse=True)
        return [int(value) for value in np.ravel(index)]

    def least(self, first: int, end: int, in_flight: float) -> Recomputation | None:
        """Return the least recomputation with which layers [first, end) fit; None when they never do."""
        classes = self.class_of[first:end]
        counts = tuple((kind, classes.count(kind)) for kind in sorted(set(classes)))
        budget = self.room_bytes - float(self.static_bytes[first, end])
        key = (counts, in_flight, round(budget, 3))
        if key not in self._least:
            groups = [self._group(kind, count, in_flight) for kind, count in counts]
            self._least[key] = least_recompute(groups, np.array([budget]))
        return self._least[key]

    def least_levels(self, first: int, end: int, in_flight: float) -> tuple[int, ...]:
        """Return the level of each layer of a range under its least recomputation; stronger levels come first."""
        found = self.least(first, end, in_flight)
        assert found is not None
        classes = self.class_of[first:end]
        left = {
            kind: [level for level, count in zip(self.levels, counts, strict=True) for _ in range(count)]
            for kind, counts in zip(sorted(set(classes)), found.counts, strict=True)
        }
        return tuple(left[kind].pop() for kind in classes)

    def with_least_recompute(self, plain: Floats, *, slack: float = 1.0) -> Floats | None:
        """Return `plain` [L + 1, L + 1] plus the least recomputation on each stage of 1F1B, [D, L + 1, L + 1].

        For programmes that minimise the largest entry: ranges above `slack` times the bottleneck of the best partition
        with one level a stage stay infinite where they need recomputation. None when no partition fits.
        """
        ranks = self.num_ranks
        rough = self.with_uniform_levels(plain)
        known = least_bottleneck(rough, ranks)
        most = np.inf if known is None else slack * known.value
        exact = np.stack([self._exact(plain, self.in_flight(stage), most) for stage in range(ranks)])
        return exact if known is not None or np.isfinite(exact).any() else None

    def with_uniform_levels(self, plain: Floats) -> Floats:
        """Return `plain` plus the recomputation of the cheapest level that fits all layers of a stage, [D, L + 1, L + 1]."""
        return np.stack([self._rough(plain, self.in_flight(stage)) for stage in range(self.num_ranks)])

    def _rough(self, plain: Floats, in_flight: int) -> Floats:
        """Return `plain` plus the cheapest uniform level that fits."""
        cost = np.full(plain.shape, np.inf)
        for level in self.levels:
            cost = np.minimum(cost, np.where(self.fits(level, in_flight), plain + self.recompute_s(level), np.inf))
        return cost

    def _exact(self, plain: Floats, in_flight: int, most: float) -> Floats:
        """Return `plain` plus the knapsack's recomputation where that is at most `most`."""
        lowest = self.levels[0]
        free = self.fits(lowest, in_flight)
        cost = np.where(free, plain + self.recompute_s(lowest), np.inf)
        possible = np.zeros_like(free)
        for level in self.levels[1:]:
            possible |= self.static_bytes + in_flight * self.kept_bytes(level) <= self.room_bytes
        for first, end in zip(*np.nonzero(possible & ~free & (plain <= most)), strict=True):
            found = self.least(int(first), int(end), in_flight)
            if found is not None:
                cost[first, end] = plain[first, end] + found.seconds
        return cost

    def _group(self, kind: int, count: int, in_flight: float) -> LayerGroup:
        layer, costs, levels = self.class_of.index(kind), self.costs, list(self.levels)
        return LayerGroup(
            count,
            costs.recompute_s[levels, layer],
            in_flight * costs.kept_bytes[levels, layer][None, :],
            costs.workspace_bytes[levels, layer],
        )


def ranges_of(rows: Floats) -> Floats:
    """Return the sums of every range of rows, [L + 1, L + 1]; infinite where the range is empty."""
    before = np.concatenate((np.zeros(1), np.cumsum(rows)))
    table = before[None, :] - before[:, None]
    table[np.tril_indices(len(before))] = np.inf
    return np.asarray(table)
