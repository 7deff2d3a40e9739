"""The replicas of a stage that reach over node groups, as one communication group.

Inside each node group the members lie on its own levels; the link between groups joins the parts. As on one group, a level
over which members are spread unevenly counts with its widest instance, so the part whose own reduction takes longest stands
for all of them, with one more tier of as many units as there are groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stagewright.planner.cost.communication import collective_s
from stagewright.planner.cost.groups import GroupShape, Tier, strided_group
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.plan import Degrees

REFERENCE_BYTES = 2.0**30


@dataclass(frozen=True)
class JoinedReplicas:
    """All replicas of a stage as one of them sees them.

    Parameters
    ----------
    shape : the devices that hold the same weights.
    num_shards : over how many devices ZeRO would divide states evenly for as small a shard as this one holds.
    padding : the largest shard over the mean one: collectives of uneven shards take as long as those of the largest.
    """

    shape: GroupShape
    num_shards: float
    padding: float = 1.0


def joined_replicas(cluster: Cluster, degrees: Degrees, replicas: Mapping[str, int]) -> GroupShape:
    """Return the shape of the devices that hold the same weights; `replicas` tells how many lie on each node group."""
    groups = {group.name: group for group in cluster.groups}
    shapes = [strided_group(degrees.cp * count, degrees.tp, groups[name]) for name, count in replicas.items()]
    slowest = max(shapes, key=lambda shape: (collective_s("all-reduce", REFERENCE_BYTES, shape), shape.size))
    if len(shapes) == 1:
        return slowest
    assert cluster.between_groups is not None
    return GroupShape((*slowest.tiers, Tier(len(shapes), cluster.between_groups)))
