"""Device pools: which devices a run of pipeline ranks takes, where stages differ in device kind or in degrees.

A pool is a set of equal, adjacent devices of one node group. A plan lays a sequence of pools along the pipeline; all
ranks of a pool have equally many devices and equal degrees, ranks of different pools may differ. On a mixed cluster a
pool is a node group (Metis, HetPipe: the order of the groups is enumerated, and groups may stay unused); on a cluster of
one kind with degrees by stage, pools are a cut of the devices in two, so that an encoder and a language model, or the
two ends of a chain, take degrees of their own (DistMM, GraphPipe).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.errors import InvalidArgument

MOST_GROUPS = 4


@dataclass(frozen=True)
class Pool:
    """`num_devices` devices of node group `group`, from device `first` of the cluster."""

    group: str
    first: int
    num_devices: int


def pool_sequences(cluster: Cluster, *, split: bool) -> list[tuple[Pool, ...]]:
    """Return the sequences of pools that plans may lay along the pipeline.

    With `split`, a cluster of one group is also cut in two: at whole nodes, or at a power of two devices inside the
    first or the last node. Raises InvalidArgument for more than 4 groups.
    """
    if len(cluster.groups) > MOST_GROUPS:
        raise InvalidArgument(
            f"cluster {cluster.name} has {len(cluster.groups)} groups, every order of at most {MOST_GROUPS} is searched",
            field="cluster",
            hint="join groups of equal devices, or plan on fewer of them",
        )
    whole = group_pools(cluster)
    found = [order for count in range(1, len(whole) + 1) for order in permutations(whole, count)]
    if split and len(whole) == 1:
        found += [_cut(whole[0], size) for size in _first_sizes(cluster)]
    return found


def group_pools(cluster: Cluster) -> list[Pool]:
    """Return each node group as one pool."""
    first, pools = 0, []
    for group in cluster.groups:
        pools.append(Pool(group.name, first, group.num_devices))
        first += group.num_devices
    return pools


def used_first(cluster: Cluster, pools: tuple[Pool, ...]) -> Cluster:
    """Return the cluster with the groups that the pools use first, so that a plan's ranks number from 0."""
    used = [group.name for group in cluster.groups if group.name in {pool.group for pool in pools}]
    order = sorted(cluster.groups, key=lambda group: (group.name not in used, cluster.groups.index(group)))
    return cluster.model_copy(update={"groups": tuple(order)})


def _cut(pool: Pool, size: int) -> tuple[Pool, Pool]:
    return Pool(pool.group, pool.first, size), Pool(pool.group, pool.first + size, pool.num_devices - size)


def _first_sizes(cluster: Cluster) -> list[int]:
    group = cluster.groups[0]
    node, total = group.devices_per_node, group.num_devices
    small = [1 << power for power in range(min(node, total).bit_length()) if 1 << power < min(node, total)]
    return sorted({*small, *(total - size for size in small), *range(node, total, node)})
