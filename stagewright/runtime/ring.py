"""Ring all-reduce by messages between neighbours: a reduce-scatter and an all-gather of n - 1 hops each.

The tensor is cut into n chunks. In hop k of the first half rank i sends chunk i - k to rank i + 1 and adds what comes to
chunk i - k - 1; then chunk i + 1 is complete on rank i, and in the second half the complete chunks travel round. Each rank
sends 2 (n - 1) chunks, 2 (n - 1) / n of the tensor when n divides it, which is the least that any algorithm sends.

`Ring` runs the hops beside the caller: a rank that waited for its neighbours where it stands could hold up the very
messages that they wait for.

Paper: Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations, JPDC 2009.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor


class Ring:
    """All-reduces over one group, one after the other, in the order in which they are started."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ring")

    def start(self, value: Tensor) -> Future[int]:
        """Start to sum a flat tensor over the group, in place; the future holds the bytes that this rank has sent."""
        return self._thread.submit(ring_all_reduce, value, self._group)


def ring_all_reduce(value: Tensor, group: dist.ProcessGroup) -> int:
    """Sum a flat tensor over the group, in place, and return the bytes that this rank has sent."""
    size = group.size()
    index = dist.get_group_rank(group, dist.get_rank())
    following = dist.get_global_rank(group, (index + 1) % size)
    before = dist.get_global_rank(group, (index - 1) % size)
    bounds = [part * value.numel() // size for part in range(size + 1)]
    chunks = [value[first:end] for first, end in pairwise(bounds)]
    num_bytes = 0
    for hop in range(2 * (size - 1)):
        gathers = hop >= size - 1
        outgoing = chunks[(index - hop) % size]
        target = chunks[(index - hop - 1) % size]
        incoming = target if gathers else torch.empty_like(target)
        operations = []
        if outgoing.numel():  # both ends know the sizes of all chunks
            operations.append(dist.P2POp(dist.isend, outgoing, following, group=group))
        if target.numel():
            operations.append(dist.P2POp(dist.irecv, incoming, before, group=group))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        if not gathers:
            target += incoming
        num_bytes += outgoing.numel() * outgoing.element_size()
    return num_bytes
