"""Checks a cluster document for numbers that no machine has: mistaken units are the usual cause."""

from __future__ import annotations

import itertools

from stagewright.planner.documents.cluster import Cluster, Device, LinkLevel

# Well outside of what any device or link of the last twenty years does.
_MEMORY_BYTES = (64e6, 4e12)
_MEMORY_BYTES_PER_S = (1e9, 100e12)
_FLOPS = (1e9, 1e17)
_LINK_BYTES_PER_S = (1e6, 20e12)
_LINK_LATENCY_S = (0.0, 0.1)


def lint_cluster(cluster: Cluster) -> list[str]:
    """Return a sentence for each number that is out of range or contradicts another."""
    found: list[str] = []
    for index, group in enumerate(cluster.groups):
        where = f"groups[{index}]"
        found += _device(group.device, f"{where}.device")
        for position, level in enumerate(group.links):
            found += _link(level, f"{where}.links[{position}]")
        speeds = [level.bytes_per_s * level.achieved_share for level in group.links]
        for position, (inner, outer) in enumerate(itertools.pairwise(speeds)):
            if outer > inner:
                found.append(
                    f"{where}.links[{position + 1}]: {outer / 1e9:.4g} GB/s is faster than the level inside it, "
                    f"{inner / 1e9:.4g} GB/s"
                )
        joins_node = any(level.num_devices == group.devices_per_node for level in group.links)
        if group.num_nodes > 1 and group.devices_per_node > 1 and not joins_node:
            found.append(
                f"{where}.links: no level joins the {group.devices_per_node} devices of a node; links inside a node "
                "count as the network"
            )
    if cluster.between_groups is not None:
        found += _link(cluster.between_groups, "between_groups")
    return found


def _device(device: Device, where: str) -> list[str]:
    found = _range(device.memory_bytes, _MEMORY_BYTES, f"{where}.memory_bytes", "bytes")
    found += _range(device.memory_bytes_per_s, _MEMORY_BYTES_PER_S, f"{where}.memory_bytes_per_s", "bytes per second")
    for dtype, rate in sorted(device.flops.items()):
        found += _range(rate, _FLOPS, f"{where}.flops.{dtype}", "FLOP per second")
    return found


def _link(level: LinkLevel, where: str) -> list[str]:
    found = _range(level.bytes_per_s, _LINK_BYTES_PER_S, f"{where}.bytes_per_s", "bytes per second")
    return found + _range(level.latency_s, _LINK_LATENCY_S, f"{where}.latency_s", "seconds")


def _range(value: float, limits: tuple[float, float], where: str, unit: str) -> list[str]:
    low, high = limits
    if low <= value <= high:
        return []
    return [f"{where}: {value:.4g} {unit} is outside {low:.4g} .. {high:.4g}; is the unit right?"]
