"""Times of collectives and messages: alpha-beta lines over the tiers of a group.

A message of m bytes costs alpha + m / B on a link of latency alpha and bandwidth B. With n members and S bytes of the
full tensor (the reduced one, or the gathered one):

    ring all-reduce        2 (n-1) alpha + 2 (n-1)/n S/B       Patarasuk and Yuan, JPDC 2009
    ring all-gather          (n-1) alpha +   (n-1)/n S/B       and reduce-scatter, its mirror
    tree all-reduce    2 ceil(log2 n) alpha + 2 S/B            double binary trees, Sanders et al. 2009
    two-level all-reduce   reduce-scatter inside, all-reduce of S/f outside, all-gather inside
    flat all-to-all          (n-1) alpha +   (n-1)/n S/B       S one device's send buffer
    two-level all-to-all   messages aggregated inside a unit first (Tutel, MLSys 2023): f-1 + n/f-1 messages, not n-1
    parameter server       max(2 S/B, n 2 S / (k B_server))    k servers

The best algorithm of a call is the fastest, as libraries choose it. A measured line of a link level replaces the model
where the whole group lies on that level. All bytes are per collective, not per rank; `sent_bytes` gives what one device
puts on the wire. Not modelled: congestion between different groups that share a switch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, overload

import numpy as np

from stagewright.planner.cost.groups import GroupShape, Tier
from stagewright.planner.cost.number import Floats, N, Number, is_positive, larger, smaller
from stagewright.planner.documents.cluster import LinkLevel, LinkSegment

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "send-receive"]
Algorithm = Literal["best", "ring", "tree", "two-level", "flat"]


class _Model(Protocol):
    """Seconds of one algorithm; see `collective_s`."""

    def __call__(self, size_bytes: N, group: GroupShape) -> N: ...


@overload
def collective_s(
    operation: Operation, size_bytes: float, group: GroupShape, algorithm: Algorithm = "best"
) -> float: ...
@overload
def collective_s(
    operation: Operation, size_bytes: Floats, group: GroupShape, algorithm: Algorithm = "best"
) -> Number: ...
def collective_s(operation: Operation, size_bytes: Number, group: GroupShape, algorithm: Algorithm = "best") -> Number:
    """Return the seconds of one collective of `size_bytes` over `group`; 0 for a group of one or an empty tensor."""
    if group.size == 1:
        return 0.0
    models = _MODELS[operation]
    if algorithm not in ("best", *models):
        raise ValueError(f"{operation} has no algorithm {algorithm!r}; known: {', '.join(models)}")
    chosen = models.values() if algorithm == "best" else [models[algorithm]]
    if isinstance(size_bytes, np.ndarray):
        if _is_measured(operation, group):  # sizes may lie on different lines
            return np.array([collective_s(operation, size, group, algorithm) for size in size_bytes.tolist()])
        if not is_positive(size_bytes):
            return 0.0
        return np.asarray(np.minimum.reduce([model(size_bytes, group) for model in chosen]))
    if size_bytes <= 0:
        return 0.0
    measured = _measured_s(operation, size_bytes, group) if algorithm == "best" else None
    return min(model(size_bytes, group) for model in chosen) if measured is None else measured


@overload
def sent_bytes(operation: Operation, size_bytes: float, num_members: int) -> float: ...
@overload
def sent_bytes(operation: Operation, size_bytes: Floats, num_members: int) -> Number: ...
def sent_bytes(operation: Operation, size_bytes: Number, num_members: int) -> Number:
    """Return the bytes one device sends in the bandwidth-optimal form of a collective."""
    n = num_members
    if n <= 1:
        return 0.0
    share = (n - 1) / n
    factor = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": share, "all-to-all": share}
    return size_bytes * factor.get(operation, 1.0)


def message_s(size_bytes: float, link: LinkLevel | None) -> float:
    """Return the seconds of one message between two devices; 0 on the same device."""
    if link is None:
        return 0.0
    line = _line(link.segments, size_bytes)
    if line is not None:
        return line.latency_s + size_bytes / line.bytes_per_s
    return link.latency_s + size_bytes / (link.bytes_per_s * link.achieved_share)


def parameter_server_s(
    size_bytes: float, *, num_workers: int, num_servers: int, worker: LinkLevel, server_bytes_per_s: float | None = None
) -> float:
    """Return the seconds in which every worker pushes its gradients and pulls the weights, `size_bytes` each way.

    Worker and server links are full duplex but push precedes pull; the server is the bottleneck as soon as there are more
    workers than servers at equal bandwidth.
    """
    bandwidth = worker.bytes_per_s * worker.achieved_share
    server = bandwidth if server_bytes_per_s is None else server_bytes_per_s
    at_worker = 2 * size_bytes / bandwidth
    at_server = num_workers * 2 * size_bytes / (num_servers * server)
    return 2 * worker.latency_s + max(at_worker, at_server)


def compressed_bytes(size_bytes: float, *, bits: float, full_bits: float = 32.0) -> float:
    """Return the bytes on the wire when each number is sent in `bits` (QSGD, 1-bit Adam, FP8 gradients)."""
    return size_bytes * bits / full_bits


def ring_all_reduce_s(size_bytes: N, group: GroupShape) -> N:
    """Return 2(n-1) alpha + 2(n-1)/n S/B; B is the slowest bandwidth one device sees on the ring."""
    n = group.size
    return 2 * group.ring_latency_s + 2 * (n - 1) / n * size_bytes / group.ring_bytes_per_s


def ring_gather_s(size_bytes: N, group: GroupShape) -> N:
    """Return (n-1) alpha + (n-1)/n S/B, the time of an all-gather or a reduce-scatter."""
    n = group.size
    return group.ring_latency_s + (n - 1) / n * size_bytes / group.ring_bytes_per_s


def tree_all_reduce_s(size_bytes: N, group: GroupShape) -> N:
    """Return the time of a pipelined double binary tree: logarithmic latency, 2 S/B."""
    depth_s = sum(math.ceil(math.log2(tier.fan_out)) * tier.latency_s for tier in group.tiers)
    return 2 * depth_s + 2 * size_bytes / group.ring_bytes_per_s


def two_level_all_reduce_s(size_bytes: N, group: GroupShape) -> N:
    """Return the time of reduce-scatter inside, all-reduce of the shards outside, all-gather inside, at every tier."""
    inner, *outer = group.tiers
    if not outer:
        return _flat_all_reduce_s(size_bytes, inner)
    one = GroupShape((inner,))
    return 2 * ring_gather_s(size_bytes, one) + two_level_all_reduce_s(
        size_bytes / inner.fan_out, GroupShape(tuple(outer))
    )


def two_level_gather_s(size_bytes: N, group: GroupShape) -> N:
    """Return the time of gathering shards outside first, then the units' parts inside."""
    inner, *outer = group.tiers
    if not outer:
        return ring_gather_s(size_bytes, group)
    one = GroupShape((inner,))
    return ring_gather_s(size_bytes, one) + two_level_gather_s(size_bytes / inner.fan_out, GroupShape(tuple(outer)))


def flat_all_to_all_s(size_bytes: N, group: GroupShape) -> N:
    """Return the time of n-1 direct messages of S/n each; different tiers work side by side."""
    latency_s, slowest_s = 0.0, 0.0 * size_bytes
    below = 1
    for tier in group.tiers:
        peers = below * (tier.fan_out - 1)
        latency_s += peers * tier.latency_s
        slowest_s = larger(slowest_s, peers * size_bytes / group.size / tier.bytes_per_s)
        below *= tier.fan_out
    return latency_s + slowest_s


def two_level_all_to_all_s(size_bytes: N, group: GroupShape) -> N:
    """Return the time of one all-to-all a tier on aggregated messages (2DH of Tutel)."""
    latency_s = sum((tier.fan_out - 1) * tier.latency_s for tier in group.tiers)
    return latency_s + size_bytes * sum((tier.fan_out - 1) / tier.fan_out / tier.bytes_per_s for tier in group.tiers)


def broadcast_s(size_bytes: N, group: GroupShape) -> N:
    """Return the time of a pipelined broadcast: logarithmic latency, S/B."""
    depth_s = sum(math.ceil(math.log2(tier.fan_out)) * tier.latency_s for tier in group.tiers)
    return depth_s + size_bytes / group.ring_bytes_per_s


def neighbour_s(size_bytes: N, group: GroupShape) -> N:
    """Return the time of one ring shift: every member sends `size_bytes` to the next, the slowest link decides."""
    slowest_s = 0.0 * size_bytes
    for tier in group.tiers:
        slowest_s = larger(slowest_s, tier.latency_s + size_bytes / tier.bytes_per_s)
    return slowest_s


def _flat_all_reduce_s(size_bytes: N, tier: Tier) -> N:
    one = GroupShape((tier,))
    if tier.link.reduces_in_network:
        return 2 * tier.latency_s + size_bytes / tier.bytes_per_s
    return smaller(ring_all_reduce_s(size_bytes, one), tree_all_reduce_s(size_bytes, one))


_MODELS: Mapping[Operation, Mapping[str, _Model]] = {
    "all-reduce": {"ring": ring_all_reduce_s, "tree": tree_all_reduce_s, "two-level": two_level_all_reduce_s},
    "all-gather": {"ring": ring_gather_s, "two-level": two_level_gather_s},
    "reduce-scatter": {"ring": ring_gather_s, "two-level": two_level_gather_s},
    "all-to-all": {"flat": flat_all_to_all_s, "two-level": two_level_all_to_all_s},
    "broadcast": {"tree": broadcast_s},
    "send-receive": {"ring": neighbour_s},
}


def _is_measured(operation: Operation, group: GroupShape) -> bool:
    return len(group.tiers) == 1 and bool(group.tiers[0].link.collectives.get(operation))


def _measured_s(operation: Operation, size_bytes: float, group: GroupShape) -> float | None:
    """Return the measured line's time, scaled from the level's own number of members to the group's."""
    if len(group.tiers) != 1:
        return None
    tier = group.tiers[0]
    line = _line(tier.link.collectives.get(operation, ()), size_bytes)
    if line is None:
        return None
    n, full = tier.fan_out, max(tier.link.num_devices, tier.fan_out)
    hops = (n - 1) / (full - 1)
    volume = ((n - 1) / n) / ((full - 1) / full)
    return line.latency_s * hops + size_bytes / line.bytes_per_s * volume


def _line(segments: Sequence[LinkSegment], size_bytes: float) -> LinkSegment | None:
    found = None
    for segment in segments:
        if segment.from_bytes <= size_bytes:
            found = segment
    return found
