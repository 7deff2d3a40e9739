"""Mocked clusters: sizes and two numbers a link in, a valid Cluster out."""

from __future__ import annotations

from collections.abc import Sequence

from stagewright.planner.documents import Cluster, Device, LinkLevel, NodeGroup, Source
from stagewright.planner.documents.cluster import DType


def cluster_factory(
    devices_per_node: int = 4,
    num_nodes: int = 1,
    *,
    name: str = "mocked",
    device: str = "mocked-device",
    memory_bytes: float = 80e9,
    memory_bytes_per_s: float = 2e12,
    flops: float = 300e12,
    price_per_hour: float | None = None,
    latency_s: float = 5e-6,
    bytes_per_s: float = 200e9,
    node_latency_s: float = 10e-6,
    node_bytes_per_s: float = 25e9,
    overlap_slowdown: float = 1.0,
) -> Cluster:
    """Return one group of equal nodes; `latency_s`, `bytes_per_s` inside a node, `node_*` between nodes.

    `flops` is the rate of every dtype, so that a test need not care about precision.
    """
    inside = LinkLevel(
        name="node",
        num_devices=devices_per_node,
        latency_s=latency_s,
        bytes_per_s=bytes_per_s,
        overlap_slowdown=overlap_slowdown,
        source=Source.MOCKED,
    )
    between = LinkLevel(
        name="network",
        num_devices=devices_per_node * num_nodes,
        latency_s=node_latency_s,
        bytes_per_s=node_bytes_per_s,
        overlap_slowdown=overlap_slowdown,
        source=Source.MOCKED,
    )
    rates: dict[DType, float] = dict.fromkeys(("fp64", "fp32", "tf32", "bf16", "fp16", "fp8"), flops)
    group = NodeGroup(
        name=name,
        device=Device(
            name=device,
            memory_bytes=memory_bytes,
            memory_bytes_per_s=memory_bytes_per_s,
            flops=rates,
            price_per_hour=price_per_hour,
            source=Source.MOCKED,
        ),
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        links=(inside, between) if num_nodes > 1 else (inside,),
    )
    return Cluster(name=name, groups=(group,))


def mixed_cluster_factory(
    clusters: Sequence[Cluster],
    *,
    name: str = "mocked-mixed",
    latency_s: float = 20e-6,
    bytes_per_s: float = 10e9,
) -> Cluster:
    """Return one cluster of all groups of `clusters`, joined by one link; groups are renamed by position."""
    groups = [group for cluster in clusters for group in cluster.groups]
    renamed = tuple(group.model_copy(update={"name": f"{group.name}-{index}"}) for index, group in enumerate(groups))
    total = sum(group.num_devices for group in groups)
    link = LinkLevel(
        name="between-groups", num_devices=total, latency_s=latency_s, bytes_per_s=bytes_per_s, source=Source.MOCKED
    )
    return Cluster(name=name, groups=renamed, between_groups=link if len(renamed) > 1 else None)
