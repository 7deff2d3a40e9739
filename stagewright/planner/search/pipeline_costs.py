"""Stages of a cut model as numbers: the costs, hops, tails and peak bytes that an order turns into a step.

Given bounds b_0 = 0 <= b_1 <= ... <= b_S = L and a recomputation level for each layer, stage s costs

    F_s = sum f,  I_s = sum (i + rho(level)),  W_s = sum (w + a x)     over layers b_s .. b_{s+1} - 1
    tail_r = sum over stages s on rank r of reduction_s + optimizer_s, plus the sum of weights tied across ranks
    peak_r = states_r + max over live vectors (a, b) of sum a_s kept_s + b_s late_s + max workspace + base

where a is the share of the order's backwards that are split and x what a layer's takes longer in two pieces.
A message between two stages costs the line of the slowest link between their ranks at the larger of what one device of
the sender and one of the receiver carries: stages may differ in degrees and in the device group that holds them. The
scorer and the search both call this and nothing else, so the number a search minimises is the number a plan predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.communication import collective_s
from stagewright.planner.cost.cost_model import SAME_DEVICE, Boundary
from stagewright.planner.cost.groups import GroupShape, Tier
from stagewright.planner.documents.cluster import Cluster, LinkLevel, NodeGroup
from stagewright.planner.search.layer_costs import LayerCosts
from stagewright.planner.search.order import Layout

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tie:
    """Two layers that share a weight: its bytes of gradient on one device are summed over both stages."""

    first_layer: int
    second_layer: int
    gradient_bytes: float


@dataclass(frozen=True, eq=False)
class PipelineCosts:
    """What one pipeline costs for one microbatch and at the end of a step.

    Parameters
    ----------
    costs : float64 [3, S], seconds of F, I, W of each stage.
    hop_s : float64 [num_hops], seconds of a message over each hop of the layout.
    tail_s : float64 [D], seconds of each rank behind its last action.
    reduction_s, optimizer_s : float64 [S], the parts of the tails; `tie_s` [D] is the rest.
    static_bytes : float64 [3, D], parameters, gradients and optimizer of each rank.
    activation_bytes, workspace_bytes : float64 [D].
    base_bytes : framework and buffers, of every rank or [D].
    version_bytes : weights beside those that the optimizer steps, of every rank or [D].
    """

    costs: Floats
    hop_s: Floats
    tail_s: Floats
    reduction_s: Floats
    optimizer_s: Floats
    tie_s: Floats
    static_bytes: Floats
    activation_bytes: Floats
    workspace_bytes: Floats
    base_bytes: float | Floats
    version_bytes: float | Floats = 0.0

    @cached_property
    def peak_bytes(self) -> Floats:
        """Peak of one device of each rank, [D]."""
        return np.asarray(
            self.static_bytes.sum(axis=0)
            + self.version_bytes
            + self.activation_bytes
            + self.workspace_bytes
            + self.base_bytes
        )


@dataclass(frozen=True, eq=False)
class Wiring:
    """The links between the pipeline ranks, as one line a pair: seconds = latency + bytes / bandwidth.

    The line of a pair is that of the slowest link between a device and its counterpart, at the model's largest boundary
    tensor. Where tensor parallelism replicates that tensor, each device may send 1 / tp of it and gather the rest
    inside (Narayanan et al., SC 2021), when that is faster.

    Parameters
    ----------
    device : int [D, devices of a rank], the cluster's device of each coordinate.
    reference_bytes : the largest boundary tensor of one device.
    inside : the tensor-parallel group, when the boundary tensor is replicated over it; else a group of one.
    insides : the same by rank, where ranks differ; a pair then takes the slower of its two ends.
    """

    cluster: Cluster
    device: npt.NDArray[np.int64]
    reference_bytes: float
    inside: GroupShape
    insides: tuple[GroupShape, ...] = ()

    @cached_property
    def _lines(self) -> dict[tuple[int, int], Boundary]:
        return {}

    def line(self, first: int, second: int) -> Boundary:
        """Return the line between two ranks, in either direction."""
        if first == second:
            return SAME_DEVICE
        key = (min(first, second), max(first, second))
        if key not in self._lines:
            link = self.link(*key)
            groups = [self.insides[rank] for rank in key] if self.insides else [self.inside]
            lines = [line_between(link, group, self.reference_bytes) for group in groups]
            self._lines[key] = max(lines, key=lambda line: line.seconds(self.reference_bytes))
        return self._lines[key]

    def lines(self, pairs: npt.NDArray[np.integer]) -> tuple[Floats, Floats]:
        """Return latency and seconds a byte of the lines between pairs of ranks [n, 2], [n], [n]."""
        if len(self.cluster.groups) > 1 or self.insides:
            each = [self.line(first, second) for first, second in pairs.tolist()]
            return np.array([line.latency_s for line in each]), np.array([1.0 / line.bytes_per_s for line in each])
        links = self.cluster.groups[0].links
        of_level = [*(line_between(link, self.inside, self.reference_bytes) for link in links), SAME_DEVICE]
        level = self.levels(pairs[:, 0], pairs[:, 1])
        level[pairs[:, 0] == pairs[:, 1]] = len(links)
        latency_s, s_per_byte = np.array([(line.latency_s, 1.0 / line.bytes_per_s) for line in of_level]).T
        return latency_s[level], s_per_byte[level]

    def levels(self, first: npt.NDArray[np.integer], second: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Return the innermost link level that joins the counterparts of two ranks, elementwise, where one group is all."""
        links = self.cluster.groups[0].links
        level = np.full(np.broadcast_shapes(first.shape, second.shape), len(links) - 1)
        for index in range(len(links) - 2, -1, -1):
            unit = self.device // links[index].num_devices
            level[(unit[first] == unit[second]).all(axis=-1)] = index
        return level

    def link(self, first: int, second: int) -> LinkLevel | None:
        """Return the slowest link between the counterparts of two ranks."""
        return slowest_link(self.device[first], self.device[second], self.cluster)

    def sums_s(self, size_bytes: float) -> Floats:
        """Return the seconds of summing `size_bytes` over any two ranks, [D, D]: one sum for each kind of link."""
        ranks = len(self.device)
        if len(self.cluster.groups) > 1:
            pairs = [[self.sum_s(a, b, size_bytes) for b in range(ranks)] for a in range(ranks)]
            return np.array(pairs).reshape(ranks, ranks)
        links = self.cluster.groups[0].links
        level = self.levels(np.arange(ranks)[:, None], np.arange(ranks)[None, :])
        seconds = np.array([pair_sum_s(link, size_bytes) for link in links])
        found = seconds[level] if size_bytes > 0 else np.zeros((ranks, ranks))
        found[np.arange(ranks), np.arange(ranks)] = 0.0
        return np.asarray(found)

    def sum_s(self, first: int, second: int, size_bytes: float) -> float:
        """Return the seconds of summing `size_bytes` over two ranks."""
        if first == second or size_bytes <= 0:
            return 0.0
        link = self.link(first, second)
        return 0.0 if link is None else pair_sum_s(link, size_bytes)


def line_between(link: LinkLevel | None, inside: GroupShape, size_bytes: float) -> Boundary:
    """Return the line of boundary tensors of this size over a link: whole, or scattered over the group `inside`."""
    direct = line_at(link, size_bytes)
    members = inside.size
    if members == 1 or link is None or size_bytes <= 0:
        return direct
    shared = line_at(link, size_bytes / members)
    gather = inside.ring_bytes_per_s * members / (members - 1)
    scattered = Boundary(
        shared.latency_s + inside.ring_latency_s, 1.0 / (1.0 / (shared.bytes_per_s * members) + 1.0 / gather)
    )
    return min(direct, scattered, key=lambda line: line.seconds(size_bytes))


def pair_sum_s(link: LinkLevel, size_bytes: float) -> float:
    """Return the seconds of summing `size_bytes` over two devices that a link joins."""
    return collective_s("all-reduce", size_bytes, GroupShape((Tier(2, link),)))


def line_at(link: LinkLevel | None, size_bytes: float) -> Boundary:
    """Return a link's line at messages of this size: a measured segment, or its two numbers."""
    if link is None:
        return SAME_DEVICE
    for segment in reversed(link.segments):
        if segment.from_bytes <= size_bytes:
            return Boundary(segment.latency_s, segment.bytes_per_s)
    return Boundary(link.latency_s, link.bytes_per_s * link.achieved_share)


def slowest_link(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], cluster: Cluster) -> LinkLevel | None:
    """Return the widest link level that joins any pair (first[i], second[i]) of a cluster's devices."""
    start, widest, height = 0, None, -1
    for group in cluster.groups:
        end = start + group.num_devices
        here, there = (first >= start) & (first < end), (second >= start) & (second < end)
        if (here != there).any():
            return cluster.between_groups
        if here.any():
            needed = _level_joining(first[here] - start, second[here] - start, group)
            if needed > height:
                height, widest = needed, group.links[needed]
        start = end
    return widest


def _level_joining(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], group: NodeGroup) -> int:
    """Return the innermost level that joins all pairs; the outermost joins whatever is left."""
    for index, level in enumerate(group.links):
        if (first // level.num_devices == second // level.num_devices).all():
            return index
    return len(group.links) - 1


def pipeline_costs(
    layout: Layout,
    bounds: Sequence[int] | Ints,
    levels: Sequence[int] | Ints,
    layers: Sequence[LayerCosts],
    wiring: Wiring,
    *,
    base_bytes: float | Floats,
    ties: Sequence[Tie] = (),
    action_overhead_s: float = 0.0,
) -> PipelineCosts:
    """Return the costs of the stages between `bounds`, where stage s takes its numbers from layers[s]."""
    num_stages, num_ranks = layout.num_stages, layout.num_ranks
    costs = np.empty((3, num_stages))
    kept, late, workspace = np.zeros(num_stages), np.zeros(num_stages), np.zeros(num_stages)
    static = np.zeros((3, num_stages))
    reduction, optimizer = np.zeros(num_stages), np.zeros(num_stages)
    level = np.asarray(levels, dtype=np.int64)
    for stage in range(num_stages):
        chosen = np.arange(bounds[stage], bounds[stage + 1])
        row = layers[stage]
        at = (level[chosen], chosen)
        costs[0, stage] = row.forward_s[chosen].sum() + action_overhead_s
        costs[1, stage] = (row.input_grad_s[chosen] + row.recompute_s[at]).sum() + action_overhead_s
        costs[2, stage] = row.weight_grad_of(layout)[chosen].sum() + (action_overhead_s if layout.split else 0.0)
        kept[stage] = row.kept_bytes[at].sum()
        late[stage] = row.late_bytes[at].sum()
        workspace[stage] = row.workspace_of(layout)[at].max(initial=0.0)
        static[:, stage] = row.state_bytes[:, chosen].sum(axis=1)
        reduction[stage] = row.tail_s[chosen].sum() + (row.stage_latency_s if len(chosen) else 0.0)
        optimizer[stage] = row.optimizer_s[chosen].sum()
    rank_static, rank_workspace = np.zeros((3, num_ranks)), np.zeros(num_ranks)
    tail, activation = np.zeros(num_ranks), np.zeros(num_ranks)
    for rank, slots in enumerate(layout.slots):
        held, once = [slot.stage for slot in slots], sorted({slot.stage for slot in slots})
        rank_static[:, rank] = static[:, once].sum(axis=1)
        rank_workspace[rank] = workspace[held].max(initial=0.0)
        tail[rank] = reduction[once].sum() + optimizer[once].sum()
        live = layout.live[rank]
        bytes_by_vector = live[:, 0] @ kept[held] + live[:, 1] @ late[held]
        activation[rank] = bytes_by_vector.max(initial=0.0)
    tie = tie_seconds(layout, bounds, wiring, ties) + replica_seconds(layout, bounds, layers, wiring)
    return PipelineCosts(
        costs=costs,
        hop_s=hop_seconds(layout, bounds, layers, wiring),
        tail_s=tail + tie,
        reduction_s=reduction,
        optimizer_s=optimizer,
        tie_s=tie,
        static_bytes=rank_static,
        activation_bytes=activation,
        workspace_bytes=rank_workspace,
        base_bytes=base_bytes,
    )


def boundary_bytes(layout: Layout, bounds: Sequence[int] | Ints, layers: Sequence[LayerCosts]) -> Floats:
    """Return the bytes of a message over each edge of the stage graph, [num_edges]: the busier end's for one device.

    In a chain, everything that is made before a boundary and used behind it crosses it, from stage to stage; in a graph
    of stages each edge carries what its target uses of its source.
    """
    return np.array([max(sent_over(layout, bounds, layers[end], edge) for end in edge) for edge in layout.edges])


def sent_over(layout: Layout, bounds: Sequence[int] | Ints, row: LayerCosts, edge: tuple[int, int]) -> float:
    """Return the bytes that one device of a stage with these costs sends (or receives) over an edge."""
    source, target = edge
    if layout.is_chain:
        return float(row.cut_bytes[bounds[target]])
    inside = (row.edges[:, 0] >= bounds[source]) & (row.edges[:, 0] < bounds[source + 1])
    inside &= (row.edges[:, 1] >= bounds[target]) & (row.edges[:, 1] < bounds[target + 1])
    tensors: dict[int, float] = {}
    for layer, size in zip(row.edges[inside, 0].tolist(), row.edge_bytes[inside].tolist(), strict=True):
        tensors[layer] = max(tensors.get(layer, 0.0), size)
    return sum(tensors.values())


def hop_seconds(layout: Layout, bounds: Sequence[int] | Ints, layers: Sequence[LayerCosts], wiring: Wiring) -> Floats:
    """Return the seconds of a message over each hop, [num_hops]."""
    sizes = np.tile(boundary_bytes(layout, bounds, layers), layout.num_replicas)
    pairs = layout.hop_pairs.tolist()
    return np.array(
        [wiring.line(a, b).seconds(size) if a != b else 0.0 for (a, b), size in zip(pairs, sizes, strict=True)]
    )


def replica_seconds(
    layout: Layout, bounds: Sequence[int] | Ints, layers: Sequence[LayerCosts], wiring: Wiring
) -> Floats:
    """Return what each rank waits for the gradients of stages that run on two ranks of the pipeline, [D]."""
    seconds = np.zeros(layout.num_ranks)
    if layout.num_replicas == 1:
        return seconds
    for stage, row in enumerate(layers):
        size = float(row.gradient_bytes[bounds[stage] : bounds[stage + 1]].sum())
        ranks = list(dict.fromkeys(layout.placement[:, stage].tolist()))
        for first, second in pairwise(ranks):
            cost = wiring.sum_s(first, second, size)
            seconds[first] += cost
            seconds[second] += cost
    return seconds


def tie_seconds(layout: Layout, bounds: Sequence[int] | Ints, wiring: Wiring, ties: Sequence[Tie]) -> Floats:
    """Return what each rank waits for weights that layers on two ranks share, [D]."""
    seconds = np.zeros(layout.num_ranks)
    for tie in ties:
        ends = [int(np.searchsorted(bounds, layer, side="right")) - 1 for layer in (tie.first_layer, tie.second_layer)]
        for row in layout.placement:
            first, second = int(row[ends[0]]), int(row[ends[1]])
            if first != second:
                cost = wiring.sum_s(first, second, tie.gradient_bytes)
                seconds[first] += cost
                seconds[second] += cost
    return seconds
