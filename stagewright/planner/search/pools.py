"""Device pools: which devices a run of pipeline ranks takes, where stages differ in device kind or in degrees.

A pool is a set of equal, adjacent devices of one node group. A plan lays a sequence of pools along the pipeline; all
ranks of a pool have equally many devices and equal degrees, ranks of different pools may differ. On a mixed cluster a
pool is a node group (Metis, HetPipe: the order of the groups is enumerated, and groups may stay unused), or several joined:
then every stage of the pool has replicas on each of them, which take samples in proportion to their speed. On a cluster of
one kind with degrees by stage, pools are a cut of the devices in two, so that an encoder and a language model, or the
two ends of a chain, take degrees of their own (DistMM, GraphPipe).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, permutations
from math import gcd

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.search.space import divisors

MOST_GROUPS = 4


@dataclass(frozen=True)
class Pool:
    """`num_devices` devices of node group `group`, from device `first` of the cluster; of several groups if `parts`.

    Parameters
    ----------
    parts : the pools that are joined, in the cluster's order; every rank of the pool takes an equal share of each.
    """

    group: str
    first: int
    num_devices: int
    parts: tuple[Pool, ...] = ()

    @classmethod
    def joined(cls, parts: tuple[Pool, ...]) -> Pool:
        """Return several pools as one."""
        return cls(
            "+".join(part.group for part in parts), parts[0].first, sum(part.num_devices for part in parts), parts
        )

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the node groups whose devices these are."""
        return tuple(part.group for part in self.parts) or (self.group,)

    @property
    def rank_counts(self) -> list[int]:
        """How many pipeline ranks the pool may be divided into."""
        return divisors(gcd(*(part.num_devices for part in self.parts or (self,))))


def pool_sequences(cluster: Cluster, *, split: bool, join: bool = False) -> list[tuple[Pool, ...]]:
    """Return the sequences of pools that plans may lay along the pipeline.

    With `join`, groups may also be joined to one pool. With `split`, a cluster of one group is also cut in two: at whole nodes, or at a power of two devices inside the
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
    if join:
        found += _joined_orders(whole)
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
    names = {name for pool in pools for name in pool.groups}
    used = [group.name for group in cluster.groups if group.name in names]
    order = sorted(cluster.groups, key=lambda group: (group.name not in used, cluster.groups.index(group)))
    return cluster.model_copy(update={"groups": tuple(order)})


def _joined_orders(whole: list[Pool]) -> list[tuple[Pool, ...]]:
    """Return the orders of disjoint sets of pools, at least one of them of several."""
    sets = [Pool.joined(row) for count in range(2, len(whole) + 1) for row in combinations(whole, count)]
    blocks = [*whole, *sets]
    return [
        order
        for count in range(1, len(whole))
        for order in permutations(blocks, count)
        if any(pool.parts for pool in order) and _disjoint(order)
    ]


def _disjoint(order: tuple[Pool, ...]) -> bool:
    names = [name for pool in order for name in pool.groups]
    return len(names) == len(set(names))


def _cut(pool: Pool, size: int) -> tuple[Pool, Pool]:
    return Pool(pool.group, pool.first, size), Pool(pool.group, pool.first + size, pool.num_devices - size)


def _first_sizes(cluster: Cluster) -> list[int]:
    group = cluster.groups[0]
    node, total = group.devices_per_node, group.num_devices
    small = [1 << power for power in range(min(node, total).bit_length()) if 1 << power < min(node, total)]
    return sorted({*small, *(total - size for size in small), *range(node, total, node)})
