"""DAPPLE's planner as published (its HPGO tool): the iteration time of a replicated pipeline, minimised exactly.

The whole pipeline is replicated rp times, so that M = global batch / rp microbatches of one sample pass through it. With
C_i the compute of stage i for the whole batch on |g_i| devices (a multiple of rp), x_i the transfer of the whole batch's
boundary after stage i, and AR_i the ring all-reduce of its weights over g_i,

    block = max( max_i C_i / |g_i|, max_i x_i ) / M
    T     = block (M - 1) + C_total / (rp M) + sum_i x_i / (rp M) + max_i max( 0, AR_i - i block )

A transfer to devices of one machine goes at 25 GB/s inside it, or at 1 GB/s for the share of senders elsewhere; to
devices of several machines at 3 GB/s. All-reduce: 2 size (g - 1) / g over 3 GB/s across machines, over 25 GB/s times
floor(g / 2) inside one. The published tool searches two stages, straight pipelines and data parallelism; here every
number of stages and every allocation of devices to machines is searched. For each value of the bottleneck, ascending,
a dynamic programme over (ideal, devices used on each machine, devices of the last stage) keeps the Pareto set of
(transfers, exposed all-reduce); what cannot beat the incumbent is dropped. Optimal for this objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument

INSIDE_BYTES_PER_S = 25e9
ACROSS_BYTES_PER_S = 3e9
POINT_TO_POINT_BYTES_PER_S = 1e9

Allocation = tuple[int, ...]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BatchGraph:
    """Sums over the ideals of a layer graph, scaled to the global batch; the empty ideal first, the whole graph last.

    Parameters
    ----------
    compute_s, weight_bytes : shape [num_ideals].
    boundary_bytes : outputs of the frontier, shape [num_ideals].
    nested : bool [num_ideals, num_ideals], row inside column.
    """

    compute_s: Floats
    weight_bytes: Floats
    boundary_bytes: Floats
    nested: npt.NDArray[np.bool_]
    global_batch: int

    @cached_property
    def total_s(self) -> float:
        return float(self.compute_s[-1])


@dataclass(frozen=True)
class MachineStage:
    """The nodes between two ideals on `allocation[k]` devices of machine k."""

    first_ideal: int
    last_ideal: int
    allocation: Allocation


@dataclass(frozen=True)
class DapplePlan:
    """A plan with its iteration time; `replication` is rp."""

    iteration_s: float
    replication: int
    stages: tuple[MachineStage, ...]


def all_reduce_s(allocation: Allocation, size_bytes: float) -> float:
    """Return the ring all-reduce of `size_bytes` on the devices of one stage."""
    count = sum(allocation)
    if count == 1:
        return 0.0
    moved = 2.0 * size_bytes * (count - 1) / count
    if sum(used > 0 for used in allocation) > 1:
        return moved / ACROSS_BYTES_PER_S
    return moved / INSIDE_BYTES_PER_S / (count // 2)


def transfer_s(sender: Allocation, receiver: Allocation, size_bytes: float) -> float:
    """Return the split-and-concat transfer of a boundary between two stages."""
    machines = [machine for machine, used in enumerate(receiver) if used]
    if len(machines) > 1:
        return size_bytes / ACROSS_BYTES_PER_S
    elsewhere = sum(used for machine, used in enumerate(sender) if machine != machines[0])
    if elsewhere:
        return size_bytes / sum(sender) * elsewhere / POINT_TO_POINT_BYTES_PER_S
    return size_bytes / INSIDE_BYTES_PER_S


def iteration_s(graph: BatchGraph, stages: Sequence[MachineStage], replication: int) -> float:
    """Return T of a given plan, from the formula alone."""
    microbatches = graph.global_batch // replication
    work = [
        float(graph.compute_s[stage.last_ideal] - graph.compute_s[stage.first_ideal]) / sum(stage.allocation)
        for stage in stages
    ]
    moves = [
        transfer_s(before.allocation, after.allocation, float(graph.boundary_bytes[before.last_ideal]))
        for before, after in pairwise(stages)
    ]
    block = max(*work, *moves, 0.0) / microbatches
    exposed = 0.0
    for index, stage in enumerate(stages):
        size = float(graph.weight_bytes[stage.last_ideal] - graph.weight_bytes[stage.first_ideal])
        exposed = max(exposed, all_reduce_s(stage.allocation, size) - index * block)
    samples = replication * microbatches
    return block * (microbatches - 1) + graph.total_s / samples + sum(moves) / samples + exposed


def dapple_partition(graph: BatchGraph, machines: Sequence[int]) -> DapplePlan:
    """Return the plan with the least iteration time on all devices of `machines` (devices of each).

    Raises InvalidArgument when the global batch has fewer samples than one replica needs.
    """
    if graph.global_batch < 1 or not machines or min(machines) < 1:
        raise InvalidArgument("global batch and machines must be at least 1", field="machines")
    total = sum(machines)
    best = DapplePlan(np.inf, 1, ())
    for replication in range(min(total, graph.global_batch), 0, -1):
        if total % replication == 0:
            best = _Search(graph, tuple(machines), replication).improve(best)
    return best


@dataclass(frozen=True)
class _Label:
    """A partial plan: transfers so far, exposed all-reduce so far, stages placed, and how it came about."""

    moves_s: float
    exposed_s: float
    count: int
    stage: MachineStage | None
    before: _Label | None


class _Search:
    """The search for one replication."""

    def __init__(self, graph: BatchGraph, machines: Allocation, replication: int) -> None:
        self._graph = graph
        self._machines = machines
        self._replication = replication
        self._microbatches = graph.global_batch // replication
        self._total = sum(machines)
        self._samples = replication * self._microbatches
        self._known: dict[Allocation, tuple[Allocation, ...]] = {}
        last = len(graph.compute_s) - 1
        self._ends = [
            [end for end in range(begin + 1, last + 1) if graph.nested[begin, end]] for begin in range(last + 1)
        ]

    def improve(self, best: DapplePlan) -> DapplePlan:
        """Return the better of `best` and the best plan of this replication."""
        for work_s in self._bottlenecks():
            block = work_s / self._microbatches
            floor = block * (self._microbatches - 1) + self._graph.total_s / self._samples
            if floor >= best.iteration_s:
                break
            stages = self._plan_at(work_s, best.iteration_s - floor)
            if stages:
                value = iteration_s(self._graph, stages, self._replication)
                if value < best.iteration_s:
                    best = DapplePlan(value, self._replication, stages)
        return best

    def _bottlenecks(self) -> list[float]:
        """Return every value the bottleneck can take, ascending, from the least possible on."""
        graph, least = self._graph, self._graph.total_s / self._total
        spans = {
            float(graph.compute_s[end] - graph.compute_s[begin])
            for begin, ends in enumerate(self._ends)
            for end in ends
        }
        values = {
            span / count for span in spans for count in range(self._replication, self._total + 1, self._replication)
        }
        for size in graph.boundary_bytes[1:-1].tolist():
            values.add(size / ACROSS_BYTES_PER_S)
            values.add(size / INSIDE_BYTES_PER_S)
            for count in range(1, self._total + 1):
                values |= {size / count * part / POINT_TO_POINT_BYTES_PER_S for part in range(1, count + 1)}
        return sorted(value for value in values if value >= least * (1 - 1e-12))

    def _plan_at(self, work_s: float, slack_s: float) -> tuple[MachineStage, ...]:
        """Return the stages with the least transfers and exposed all-reduce under a bottleneck, if below `slack_s`."""
        graph, limit, block = self._graph, work_s * (1 + 1e-12), work_s / self._microbatches
        last = len(graph.compute_s) - 1
        empty: Allocation = (0,) * len(self._machines)
        fronts: dict[int, dict[tuple[Allocation, Allocation], list[_Label]]] = {
            0: {(empty, empty): [_Label(0.0, 0.0, 0, None, None)]}
        }
        finished: _Label | None = None
        for begin in range(last):
            for (used, sender), labels in fronts.pop(begin, {}).items():
                devices = sum(used)
                for end in self._ends[begin]:
                    load = float(graph.compute_s[end] - graph.compute_s[begin])
                    if load > limit * (self._total - devices):
                        break
                    left = graph.total_s - float(graph.compute_s[end])
                    for allocation in self._allocations(used):
                        count = sum(allocation)
                        remaining = self._total - devices - count
                        if load > limit * count or left > limit * remaining or (end == last) != (remaining == 0):
                            continue
                        move = transfer_s(sender, allocation, float(graph.boundary_bytes[begin])) if begin else 0.0
                        if move > limit:
                            continue
                        stage = MachineStage(begin, end, allocation)
                        size = float(graph.weight_bytes[end] - graph.weight_bytes[begin])
                        reduce_s = all_reduce_s(allocation, size)
                        key = (tuple(a + b for a, b in zip(used, allocation, strict=True)), allocation)
                        for label in labels:
                            moves = label.moves_s + move / self._samples
                            exposed = max(label.exposed_s, reduce_s - label.count * block)
                            if moves + exposed >= slack_s:
                                continue
                            grown = _Label(moves, exposed, label.count + 1, stage, label)
                            if end == last:
                                slack_s, finished = moves + exposed, grown
                            else:
                                _insert(fronts.setdefault(end, {}).setdefault(key, []), grown)
        stages: list[MachineStage] = []
        while finished is not None and finished.stage is not None:
            stages.append(finished.stage)
            finished = finished.before
        return tuple(reversed(stages))

    def _allocations(self, used: Allocation) -> tuple[Allocation, ...]:
        """Return every way to give a stage a multiple of rp free devices; of equal unused machines the first ones serve."""
        if used not in self._known:
            partial: list[Allocation] = [()]
            for machine, (size, taken) in enumerate(zip(self._machines, used, strict=True)):
                equal = machine > 0 and not taken and not used[machine - 1] and self._machines[machine - 1] == size
                partial = [
                    (*chosen, count)
                    for chosen in partial
                    for count in range(min(size - taken, chosen[-1] if equal else size) + 1)
                ]
            self._known[used] = tuple(
                chosen for chosen in partial if sum(chosen) and sum(chosen) % self._replication == 0
            )
        return self._known[used]


def _insert(labels: list[_Label], label: _Label) -> None:
    """Keep the labels that no other beats in transfers, exposed all-reduce and stages placed."""
    for known in labels:
        if known.moves_s <= label.moves_s and known.exposed_s <= label.exposed_s and known.count >= label.count:
            return
    labels[:] = [
        known
        for known in labels
        if not (label.moves_s <= known.moves_s and label.exposed_s <= known.exposed_s and label.count >= known.count)
    ]
    labels.append(label)
