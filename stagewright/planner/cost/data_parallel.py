"""Gradient reduction and sharded states: seconds and bytes by ZeRO stage.

With Psi parameters on a device, n replicas, g bytes a gradient and w bytes a weight (Rajbhandari et al., SC 2020):

    stage 0    all-reduce of g Psi after the last backward
    stage 1    reduce-scatter of g Psi, all-gather of w Psi: the same bytes (weight-update sharding, Xu et al. 2020)
    stage 2    the same; once for each microbatch unless gradients are accumulated in full
    stage 3    all-gather of w Psi before each forward and each backward, reduce-scatter of g Psi: 3 Psi in place of 2;
               once a microbatch, or once an iteration when a schedule runs all microbatches of a chunk in a row

Hybrid sharding over p < n devices (FSDP's HSDP, Zhao et al. 2023; MiCS, Zhang et al. 2022) gathers and scatters inside
groups of p and all-reduces shards of Psi/p between the n/p groups once an iteration.
Overlapped reduction (PyTorch DDP, Li et al. 2020) leaves the last bucket, and what exceeds the backward it hides under.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stagewright.planner.cost.communication import collective_s, sent_bytes
from stagewright.planner.cost.groups import GroupShape, Tier


@dataclass(frozen=True)
class ReplicaTraffic:
    """Data-parallel communication of some parameters on one device.

    Parameters
    ----------
    forward_s, backward_s : for each microbatch (weights gathered, gradients scattered), before overlap.
    tail_s : once an iteration after the last backward.
    microbatch_bytes, iteration_bytes : what one device sends for each microbatch, and once an iteration.
    """

    forward_s: float
    backward_s: float
    tail_s: float
    microbatch_bytes: float
    iteration_bytes: float

    def __add__(self, other: ReplicaTraffic) -> ReplicaTraffic:
        return ReplicaTraffic(
            self.forward_s + other.forward_s,
            self.backward_s + other.backward_s,
            self.tail_s + other.tail_s,
            self.microbatch_bytes + other.microbatch_bytes,
            self.iteration_bytes + other.iteration_bytes,
        )


NO_TRAFFIC = ReplicaTraffic(0.0, 0.0, 0.0, 0.0, 0.0)


def split_group(group: GroupShape, shard_size: int | None) -> tuple[GroupShape, GroupShape]:
    """Return (shard group, groups between which shards are replicated): the innermost `shard_size` members shard."""
    if shard_size is None or shard_size >= group.size:
        return group, GroupShape(())
    inner: list[Tier] = []
    outer: list[Tier] = []
    left = shard_size
    for tier in group.tiers:
        taken = math.gcd(left, tier.fan_out)
        left //= taken
        if taken > 1:
            inner.append(Tier(taken, tier.link))
        if tier.fan_out // taken > 1:
            outer.append(Tier(tier.fan_out // taken, tier.link))
    return GroupShape(tuple(inner)), GroupShape(tuple(outer))


def replica_traffic(
    gradient_bytes: float,
    weight_bytes: float,
    group: GroupShape,
    *,
    zero: int,
    shard_size: int | None = None,
    accumulate: bool = True,
    gather_once: bool = False,
    update_bytes: float = 0.0,
) -> ReplicaTraffic:
    """Return the communication of gradients and weights of those sizes over the devices that share them.

    `update_bytes` are those of updates that shards gather once an iteration because they need whole matrices (Muon).
    """
    if group.size == 1:
        return NO_TRAFFIC
    if zero == 0:
        return ReplicaTraffic(
            0.0,
            0.0,
            collective_s("all-reduce", gradient_bytes, group),
            0.0,
            sent_bytes("all-reduce", gradient_bytes, group.size),
        )
    inner, outer = split_group(group, shard_size)
    scatter_s = collective_s("reduce-scatter", gradient_bytes, inner)
    gather_s = collective_s("all-gather", weight_bytes, inner)
    across_s = collective_s("all-reduce", gradient_bytes / inner.size, outer)
    scatter_bytes = sent_bytes("reduce-scatter", gradient_bytes, inner.size)
    gather_bytes = sent_bytes("all-gather", weight_bytes, inner.size)
    update_s = collective_s("all-gather", update_bytes, inner)
    across_bytes = sent_bytes("all-reduce", gradient_bytes / inner.size, outer.size)
    gathers_each = zero == 3 and not gather_once
    scatters_each = zero >= 2 and not accumulate
    gathers = 2 if zero == 3 else 1
    return ReplicaTraffic(
        forward_s=gather_s if gathers_each else 0.0,
        backward_s=(gather_s if gathers_each else 0.0) + (scatter_s if scatters_each else 0.0),
        tail_s=across_s
        + update_s
        + (0.0 if scatters_each else scatter_s)
        + (0.0 if gathers_each else gathers * gather_s),
        microbatch_bytes=(2 * gather_bytes if gathers_each else 0.0) + (scatter_bytes if scatters_each else 0.0),
        iteration_bytes=across_bytes
        + sent_bytes("all-gather", update_bytes, inner.size)
        + (0.0 if scatters_each else scatter_bytes)
        + (0.0 if gathers_each else gathers * gather_bytes),
    )


def num_buckets(gradient_bytes: float, bucket_bytes: float) -> int:
    """Return how many buckets gradients are reduced in, at least 1."""
    return max(1, math.ceil(gradient_bytes / bucket_bytes))


def bucketed_exposed_s(
    gradient_bytes: float, group: GroupShape, *, bucket_bytes: float, backward_s: float, slowdown: float = 1.0
) -> float:
    """Return how long after the end of the backward the bucketed all-reduces end.

    Buckets become ready evenly over the backward and are reduced one after the other, so the last ends at the later of
    its own readiness and its predecessors' end. `slowdown` stretches the backward while links are busy.
    """
    if group.size == 1 or gradient_bytes <= 0:
        return 0.0
    count = num_buckets(gradient_bytes, bucket_bytes)
    each_s = collective_s("all-reduce", gradient_bytes / count, group)
    busy_s = min(backward_s, count * each_s) * (slowdown - 1)
    # Bucket k (from 1) is ready at k/count of the backward; the end is max over k of ready(k) + (count-k+1) each.
    end_s = max(backward_s / count + count * each_s, backward_s + each_s)
    return end_s - backward_s + busy_s


@dataclass(frozen=True)
class ShardedTraffic:
    """Elements one device sends in an iteration of ZeRO-3, inside its node and between nodes."""

    inside: float
    between: float


def plain_sharded_traffic(num_parameters: float, num_devices: int, devices_per_node: int) -> ShardedTraffic:
    """Return ZeRO-3's 3 Psi (n-1)/n elements: two gathers, one scatter; on a ring over nodes each node's boundary
    carries the whole of it, so every element counts as between nodes when there is more than one."""
    total = 3 * num_parameters * (num_devices - 1) / num_devices
    return ShardedTraffic(0.0, total) if num_devices > devices_per_node else ShardedTraffic(total, 0.0)


def compressed_sharded_traffic(num_parameters: float) -> ShardedTraffic:
    """Return ZeRO++'s traffic in 2-byte elements (Wang et al. 2023): 3 Psi between nodes become 0.75 Psi.

    Weights are gathered in 8 bits forward (Psi/2), from a copy inside the node backward (0 between nodes), and gradients
    are exchanged in 4 bits (Psi/4).
    """
    return ShardedTraffic(inside=num_parameters, between=num_parameters * (0.5 + 0.0 + 0.25))


def fsdp_peak_parameter_bytes(unit_bytes: list[float], num_shards: int, *, in_flight: int = 2) -> float:
    """Return FSDP's peak of parameters: every unit's shard, and the largest `in_flight` neighbours gathered whole."""
    gathered = max(sum(unit_bytes[first : first + in_flight]) for first in range(len(unit_bytes)))
    return sum(unit_bytes) / num_shards + gathered
