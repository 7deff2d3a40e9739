"""DAPPLE's planner as the paper states it (Fan et al., PPoPP 2021): latency with a pivot stage, three placement policies.

Computation stages alternate with network stages; stage s has forward F_s, backward B_s and all-reduce AR_s:

    L = sum_{s <= Q} F_s  +  (M - 1)(F_Q + B_Q)  +  max_s ( AR_s + { sum_{a=s..Q} B_a,  s <= Q ;  -sum_{a=Q+1..s} B_a,  s > Q } )
    Q := S - 1;  for s = S - 2 .. 0:  Q := s  if  (M - 1)(F_s + B_s) > (M - 1)(F_Q + B_Q) + sum_{a=s+1..Q-1} (F_a + B_a)

With j layers placed on the devices g (a count on each machine), the rest on all other devices as the last stage,

    TPL(j, g) = min over j' < j, m', g' in D(g, m') of L( stages of TPL(j', g - g')  +  (j' .. j] on g'  +  last stage )

D(g, m') are three policies for taking m' devices: *fresh first* (machines nobody uses yet, whole ones if they suffice),
*append first* (fill machines already partly used), *scatter first* (evenly over the used machines, or over all when none
is used). One best plan is kept for each state, so this is the paper's heuristic over stages and exact over nothing; L
itself is 0 to 22 % below the simulated step of 1F1B. O(N^2 G^2) latencies for each reachable allocation.

On the common Problem all stages have as many replicas and lie alike, so the programme runs for each configuration with
D equal stages; fresh and scatter first are the two axis orders (replicas inside a node, or one on each).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.problem import Partition

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Allocation = tuple[int, ...]

POLICIES = ("fresh", "append", "scatter")


@dataclass(frozen=True, eq=False)
class DappleProblem:
    """A chain of layers on machines of equal devices.

    Parameters
    ----------
    forward_s, backward_s : of one microbatch on one device, [N].
    weight_bytes : [N].
    boundary_bytes : [N - 1], sent forward after each layer but the last, and back again as its gradient.
    machines : devices of each machine.
    inside_bytes_per_s, across_bytes_per_s : between devices of one machine, between machines.
    """

    forward_s: Floats
    backward_s: Floats
    weight_bytes: Floats
    boundary_bytes: Floats
    machines: Allocation
    num_microbatches: int
    inside_bytes_per_s: float
    across_bytes_per_s: float

    @property
    def num_layers(self) -> int:
        return len(self.forward_s)

    @cached_property
    def _before(self) -> Floats:
        """Sums of forward, backward, weights before each layer, [3, N + 1]."""
        rows = np.stack((self.forward_s, self.backward_s, self.weight_bytes))
        return np.concatenate((np.zeros((3, 1)), np.cumsum(rows, axis=1)), axis=1)

    def latency_s(self, stages: Sequence[PlacedStage]) -> float:
        """Return L of stages with the network stages between them."""
        forward, backward, reduce = [], [], []
        for index, stage in enumerate(stages):
            if index:
                hop = self.transfer_s(stages[index - 1], stage)
                forward.append(hop)
                backward.append(hop)
                reduce.append(0.0)
            f, b, weights = (self._before[:, stage.end] - self._before[:, stage.first]).tolist()
            forward.append(f / stage.num_devices)
            backward.append(b / stage.num_devices)
            reduce.append(self.all_reduce_s(stage.allocation, weights))
        return float(pivot_latency_s(np.array(forward), np.array(backward), np.array(reduce), self.num_microbatches)[0])

    def all_reduce_s(self, allocation: Allocation, size_bytes: float) -> float:
        """Return the ring all-reduce over a stage's devices."""
        count = sum(allocation)
        across = sum(1 for taken in allocation if taken) > 1
        rate = self.across_bytes_per_s if across else self.inside_bytes_per_s
        return 2.0 * size_bytes * (count - 1) / count / rate

    def transfer_s(self, sender: PlacedStage, receiver: PlacedStage) -> float:
        """Return the transfer of one microbatch's boundary, split over the smaller group."""
        size = float(self.boundary_bytes[sender.end - 1])
        together = [
            machine
            for machine, (a, b) in enumerate(zip(sender.allocation, receiver.allocation, strict=True))
            if a and b
        ]
        inside = (
            len(together) == 1
            and sum(1 for a in sender.allocation if a) == sum(1 for b in receiver.allocation if b) == 1
        )
        rate = self.inside_bytes_per_s if inside else self.across_bytes_per_s
        return size / min(sender.num_devices, receiver.num_devices) / rate


@dataclass(frozen=True)
class PlacedStage:
    """Layers [first, end) on `allocation[k]` devices of machine k, and the policy that took them."""

    first: int
    end: int
    allocation: Allocation
    policy: str

    @property
    def num_devices(self) -> int:
        return sum(self.allocation)


@dataclass(frozen=True)
class DapplePipeline:
    """The plan of least latency that the recurrence finds."""

    latency_s: float
    stages: tuple[PlacedStage, ...]


@njit(cache=True)
def pivot_latency_s(forward: Floats, backward: Floats, all_reduce: Floats, num_microbatches: int) -> tuple[float, int]:
    """Return L and the pivot stage of F, B and AR by stage, network stages included."""
    last = len(forward) - 1
    pivot = last
    for stage in range(last - 1, -1, -1):
        between = 0.0
        for other in range(stage + 1, pivot):
            between += forward[other] + backward[other]
        own = (num_microbatches - 1) * (forward[stage] + backward[stage])
        if own > (num_microbatches - 1) * (forward[pivot] + backward[pivot]) + between:
            pivot = stage
    warm = 0.0
    for stage in range(pivot + 1):
        warm += forward[stage]
    end = -np.inf
    tail = 0.0
    for stage in range(pivot, -1, -1):
        tail += backward[stage]
        end = max(end, all_reduce[stage] + tail)
    tail = 0.0
    for stage in range(pivot + 1, last + 1):
        tail -= backward[stage]
        end = max(end, all_reduce[stage] + tail)
    return warm + (num_microbatches - 1) * (forward[pivot] + backward[pivot]) + end, pivot


def take(machines: Allocation, used: Allocation, count: int, policy: str) -> Allocation | None:
    """Return `count` free devices by a policy, as a number on each machine; None when there are not so many."""
    free = [size - taken for size, taken in zip(machines, used, strict=True)]
    if count > sum(free):
        return None
    order = list(range(len(machines)))
    taken = [0] * len(machines)
    if policy == "scatter":
        group = [k for k in order if used[k] and free[k]] or [k for k in order if free[k]]
        while count:
            open_machines = [k for k in group if free[k] > taken[k]] or [k for k in order if free[k] > taken[k]]
            chosen = min(open_machines, key=lambda k: (taken[k], k))
            taken[chosen] += 1
            count -= 1
        return tuple(taken)
    order.sort(key=lambda k: (bool(used[k]) == (policy == "fresh"), k))
    for machine in order:
        taken[machine] = min(free[machine], count)
        count -= taken[machine]
    return tuple(taken)


def dapple_pipeline(problem: DappleProblem, *, policies: Sequence[str] = POLICIES) -> DapplePipeline:
    """Return the plan that the recurrence finds over these policies."""
    layers, machines = problem.num_layers, problem.machines
    nothing = (0,) * len(machines)
    best: DapplePipeline | None = None
    states: dict[tuple[int, Allocation], tuple[float, tuple[PlacedStage, ...]]] = {(0, nothing): (np.inf, ())}
    for placed in range(layers):
        for (layer, used), (_, stages) in sorted(states.items()):
            if layer != placed:
                continue
            rest = tuple(size - taken for size, taken in zip(machines, used, strict=True))
            whole = (*stages, PlacedStage(layer, layers, rest, "rest"))
            latency = problem.latency_s(whole)
            if best is None or latency < best.latency_s * (1 - 1e-12):
                best = DapplePipeline(latency, whole)
            for count in range(1, sum(rest)):
                for policy in policies:
                    allocation = take(machines, used, count, policy)
                    assert allocation is not None
                    after = tuple(a + b for a, b in zip(used, allocation, strict=True))
                    left = tuple(size - taken for size, taken in zip(machines, after, strict=True))
                    for end in range(layer + 1, layers):
                        grown = (*stages, PlacedStage(layer, end, allocation, policy))
                        value = problem.latency_s((*grown, PlacedStage(end, layers, left, "rest")))
                        known = states.get((end, after))
                        if known is None or value < known[0] * (1 - 1e-12):
                            states[end, after] = (value, grown)
    assert best is not None
    return best


@njit(cache=True)
def equal_stages(
    forward: Floats, backward: Floats, all_reduce: Floats, hop: Floats, num_stages: int, num_microbatches: int
) -> tuple[float, Ints]:
    """Return L and the bounds of the recurrence with `num_stages` stages of one group of devices each.

    Tables [L + 1, L + 1] are of layer ranges on one group, `hop` [L + 1] of cuts. The last stage of an unfinished plan
    stands on all the groups that are left.
    """
    layers = len(hop) - 1
    best = np.full((num_stages, layers + 1), np.inf)
    bounds = np.zeros((num_stages, layers + 1, num_stages + 1), dtype=np.int64)
    best[0, 0] = 0.0
    f = np.zeros(2 * num_stages - 1)
    b = np.zeros(2 * num_stages - 1)
    ar = np.zeros(2 * num_stages - 1)
    for stage in range(1, num_stages):
        for end in range(stage, layers - (num_stages - 1 - stage)):
            for first in range(stage - 1, end):
                if not np.isfinite(best[stage - 1, first]):
                    continue
                known = bounds[stage - 1, first]
                for index in range(stage + 1):
                    low = known[index] if index < stage else end
                    high = known[index + 1] if index < stage - 1 else (end if index == stage - 1 else layers)
                    groups = 1 if index < stage else num_stages - stage
                    if index:
                        f[2 * index - 1] = hop[low]
                        b[2 * index - 1] = hop[low]
                        ar[2 * index - 1] = 0.0
                    f[2 * index] = forward[low, high] / groups
                    b[2 * index] = backward[low, high] / groups
                    ar[2 * index] = all_reduce[low, high]
                size = 2 * stage + 1
                value, _ = pivot_latency_s(f[:size], b[:size], ar[:size], num_microbatches)
                if value < best[stage, end]:
                    best[stage, end] = value
                    bounds[stage, end] = known
                    bounds[stage, end, stage - 1] = first
                    bounds[stage, end, stage] = end
    if num_stages == 1:
        value, _ = pivot_latency_s(forward[0, layers:], backward[0, layers:], all_reduce[0, layers:], num_microbatches)
        return value, np.array([0, layers])
    end = int(np.argmin(best[num_stages - 1]))
    found = bounds[num_stages - 1, end].copy()
    found[num_stages] = layers
    return best[num_stages - 1, end], found


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    value, bounds = equal_stages(
        table.forward_s, table.backward_s, table.reduction_s, table.hop_s, table.num_ranks, table.num_microbatches
    )
    if np.isfinite(value):
        yield float(value), table.partition(tuple(bounds.tolist()))


PLANNER = table_planner(
    "dapple",
    "Fan et al., DAPPLE: A Pipelined Data Parallel Approach for Training Large Models, PPoPP 2021",
    _solve_one,
    reach=Reach(axis_orders=True),
    objective="latency with a pivot stage, seconds",
)
