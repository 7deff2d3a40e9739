"""Rank groups on nested link levels: how many members a group has below each level, and what a hop costs there.

A group of devices is described by its tiers, innermost first. The tier of a level with fan-out f says that f units (a unit
is what the level below joins) take part inside one instance of this level. A tensor-parallel group of 8 in a node of 8
is one tier of fan-out 8; a data-parallel group of 24 with stride 8 is one tier of fan-out 24 between nodes; one of 32
with stride 1 is a tier of 8 in the node and one of 4 between nodes. In the last case each node brings 8 network cards to
the group, in the second only one: that difference is why groups and not sizes are priced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.cluster import Cluster, LinkLevel, NodeGroup
from stagewright.planner.documents.plan import Axis

Devices = npt.NDArray[np.int64]
AxisOrder = tuple[Axis, ...]
DEFAULT_ORDER: AxisOrder = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class Tier:
    """One link level as a group sees it: `fan_out` units inside one instance of the level."""

    fan_out: int
    link: LinkLevel

    @property
    def latency_s(self) -> float:
        return self.link.latency_s

    @property
    def bytes_per_s(self) -> float:
        """What one device reaches with large messages, each direction."""
        return self.link.bytes_per_s * self.link.achieved_share


@dataclass(frozen=True)
class GroupShape:
    """The tiers of one group, innermost first, only those with a fan-out above 1."""

    tiers: tuple[Tier, ...]

    @cached_property
    def size(self) -> int:
        """Devices in the group."""
        size = 1
        for tier in self.tiers:
            size *= tier.fan_out
        return size

    @cached_property
    def ring_bytes_per_s(self) -> float:
        """Slowest bandwidth one device sees on rings through all members: members below a tier share its links."""
        slowest = float("inf")
        below = 1
        for tier in self.tiers:
            slowest = min(slowest, below * tier.bytes_per_s)
            below *= tier.fan_out
        return slowest

    @cached_property
    def ring_latency_s(self) -> float:
        """Sum of the hops of one ring through all members, without the one that closes it."""
        total = 0.0
        units = self.size
        for tier in self.tiers:
            above = units // tier.fan_out
            total += (units - above) * tier.latency_s
            units = above
        return total

    def outermost(self) -> LinkLevel | None:
        """Return the widest link the group crosses; None for a group of one."""
        return self.tiers[-1].link if self.tiers else None


def group_of_ranks(ranks: Sequence[int], group: NodeGroup) -> GroupShape:
    """Return the shape of devices (numbered inside `group`, node by node) on the group's link levels.

    A level over which the members are spread unevenly counts with the widest fan-out that any of its instances has.
    """
    tiers: list[Tier] = []
    units = sorted(set(ranks))
    for level in group.links:
        inside: dict[int, int] = {}
        for device in units:
            inside[device // level.num_devices] = inside.get(device // level.num_devices, 0) + 1
        fan_out = max(inside.values())
        if fan_out > 1:
            tiers.append(Tier(fan_out, level))
        units = sorted(index * level.num_devices for index in inside)
        if len(units) == 1:
            break
    return GroupShape(tuple(tiers))


def strided_group(size: int, stride: int, group: NodeGroup, *, first: int = 0) -> GroupShape:
    """Return the shape of `size` devices at distance `stride`."""
    return group_of_ranks(range(first, first + size * stride, stride), group)


def axis_stride(axis: Axis, degrees: dict[Axis, int], order: AxisOrder = DEFAULT_ORDER) -> int:
    """Return the distance between neighbours on an axis: the product of the degrees that vary faster."""
    stride = 1
    for faster in order[: order.index(axis)]:
        stride *= degrees.get(faster, 1)
    return stride


def link_between(first: int, second: int, cluster: Cluster) -> LinkLevel | None:
    """Return the innermost link that joins two devices of a cluster; None for a device and itself."""
    if first == second:
        return None
    start = 0
    for group in cluster.groups:
        end = start + group.num_devices
        inside = (start <= first < end, start <= second < end)
        if all(inside):
            for level in group.links:
                if (first - start) // level.num_devices == (second - start) // level.num_devices:
                    return level
            return group.links[-1]
        if any(inside):
            return cluster.between_groups
        start = end
    raise IndexError(f"devices {first} and {second} of {cluster.num_devices}")


def widest_link(first: Devices, second: Devices, cluster: Cluster) -> LinkLevel | None:
    """Return the widest link that joins any of the pairs (first[i], second[i]); None where all pairs are one device."""
    a, b = first, second
    if (a == b).all():
        return None
    start, height, widest = 0, -1, None
    for group in cluster.groups:
        end = start + group.num_devices
        here, there = (a >= start) & (a < end), (b >= start) & (b < end)
        if (here != there).any():
            return cluster.between_groups
        inside = here & (a != b)
        start_of_group, start = start, end
        if not inside.any():
            continue
        x, y = a[inside] - start_of_group, b[inside] - start_of_group
        joined = [bool((x // level.num_devices == y // level.num_devices).all()) for level in group.links]
        needed = joined.index(True) if True in joined else len(joined) - 1
        if needed > height:
            height, widest = needed, group.links[needed]
    return widest
