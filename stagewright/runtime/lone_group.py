"""A process group in which one process plays all ranks: every peer is taken to hold what this rank holds.

A rank's part of a plan can then run alone on one device, with the shapes and buffers that it has among its peers. Sums
are left as they are, so that values keep their size; gathered parts are copies of this rank's own; what other ranks
would send by message is random. Nothing waits: the time of communication is none of this group's.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

BACKEND = "lone"
SCALE = 0.1  # of what messages bring


class LoneWork(dist._Work):
    """An operation that is over."""

    def __init__(self, values: object = None) -> None:
        super().__init__()
        self._future: Future[object] = Future()
        self._future.set_result(values)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """Return True."""
        return True

    def get_future(self) -> Future[object]:
        """Return a future that holds the result."""
        return self._future


class LoneGroup(dist.ProcessGroup):
    """The group; torch calls the methods below, whose names and signatures are its own."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        super().__init__(rank, num_ranks)
        self._rank = rank
        self._num_ranks = num_ranks

    def size(self) -> int:
        """Return the number of ranks that the plan has here."""
        return self._num_ranks

    def rank(self) -> int:
        """Return this rank's index."""
        return self._rank

    def getBackendName(self) -> str:
        """Return the backend's name."""
        return BACKEND

    def allreduce(self, tensors: list[Tensor], opts: object = None) -> LoneWork:
        """Leave the tensors as they are."""
        return LoneWork(tensors)

    def broadcast(self, tensors: list[Tensor], opts: object = None) -> LoneWork:
        """Leave the tensors as they are."""
        return LoneWork(tensors)

    def barrier(self, opts: object = None) -> LoneWork:
        """Return at once."""
        return LoneWork()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None) -> LoneWork:
        """Fill every part with a copy of this rank's."""
        for parts, own in zip(outputs, inputs, strict=True):
            for part in parts:
                part.copy_(own)
        return LoneWork(outputs)

    def all_gather_single(self, output: Tensor, own: Tensor, opts: object = None) -> LoneWork:
        """Fill every part with a copy of this rank's."""
        output.view(self._num_ranks, *own.shape).copy_(own.expand(self._num_ranks, *own.shape))
        return LoneWork(output)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: object = None) -> LoneWork:
        """Take this rank's part."""
        for output, parts in zip(outputs, inputs, strict=True):
            output.copy_(parts[self._rank])
        return LoneWork(outputs)

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, opts: object = None) -> LoneWork:
        """Take this rank's part."""
        output.copy_(whole.view(self._num_ranks, *output.shape)[self._rank])
        return LoneWork(output)

    def all_to_all_single(
        self,
        output: Tensor,
        own: Tensor,
        output_sizes: Sequence[int] | None = None,
        own_sizes: Sequence[int] | None = None,
        opts: object = None,
    ) -> LoneWork:
        """Receive what this rank sends; sizes are then equal both ways."""
        output.copy_(own.view(output.shape))
        return LoneWork(output)

    def send(self, tensors: list[Tensor], target: int, tag: int) -> LoneWork:
        """Drop the message."""
        return LoneWork()

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> LoneWork:
        """Fill the message with random values."""
        for value in tensors:
            if value.is_floating_point():
                value.normal_(0.0, SCALE)
            else:
                value.zero_()
        return LoneWork(tensors)

    # The names of torch up to 2.12.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single


def init_lone_group(rank: int, num_ranks: int) -> None:
    """Make the default process group one in which this process is `rank` of `num_ranks`."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _make, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=num_ranks)


def _make(store: dist.Store, rank: int, num_ranks: int, timeout: timedelta) -> LoneGroup:
    return LoneGroup(rank, num_ranks)
