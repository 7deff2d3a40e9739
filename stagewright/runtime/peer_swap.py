"""Activations lent to a peer rank and fetched back: BPipe's EVICT and LOAD.

A rank that evicts sends the storages that a unit's backward will read to its peer and gives their memory back; a load sizes
them again and receives their bytes. Tensors and graph stay, so nothing in autograd notices. The peer accepts and returns
in a thread of its own, in the order of the evicting rank's list, so that its own actions have no new place for it; both
ends work through that one order, and neither waits for anything else in between.

Evicting: count and sizes of the storages, then their bytes (tag 1). Loading: the bytes back (tag 2).

Paper: Kim et al., BPipe, ICML 2023.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage

from stagewright.planner.link_bytes import LENT
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.schedule import Schedule
from stagewright.runtime.groups import Groups
from stagewright.runtime.topology import Topology

_EVICTED, _RETURNED = 1, 2
UnitKey = tuple[int, int, int, int]  # (replica, stage, microbatch, slice)


class PeerSwap:
    """One rank's half of a pair.

    Parameters
    ----------
    group : the two ranks of the pair; peer : the other's global rank.
    accepted : the peer's EVICT and LOAD actions in the order of its list.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, accepted: Sequence[Action], device: torch.device) -> None:
        self._group = group
        self._peer = peer
        self._accepted = tuple(accepted)
        self._device = device
        self._away: dict[UnitKey, list[tuple[UntypedStorage, int]]] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.bytes_lent = 0
        self.bytes_returned = 0

    def begin(self) -> None:
        """Start to accept what the peer evicts in this iteration."""
        if self._accepted:
            self._thread = threading.Thread(target=self._accept_all, name="peer swap", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait until the peer has everything back; raises what went wrong meanwhile."""
        assert not self._away, f"still away: {[*self._away]}"
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def evict(self, action: Action, storages: Sequence[UntypedStorage]) -> None:
        """Send a unit's storages to the peer and free them."""
        sizes = [storage.nbytes() for storage in storages]
        self._send(torch.tensor([len(sizes)], dtype=torch.int64), _EVICTED)
        self._send(torch.tensor(sizes, dtype=torch.int64), _EVICTED)
        for storage in storages:
            self._send(_bytes_of(storage, self._device), _EVICTED)
            storage.resize_(0)
        self._away[_key(action)] = list(zip(storages, sizes, strict=True))
        self.bytes_lent += sum(sizes)

    def load(self, action: Action) -> None:
        """Fetch a unit's storages back."""
        for storage, size in self._away.pop(_key(action)):
            storage.resize_(size)
            self._receive(_bytes_of(storage, self._device), _RETURNED)

    def _accept_all(self) -> None:
        held: dict[UnitKey, list[Tensor]] = {}
        try:
            for action in self._accepted:
                if action.kind is Kind.EVICT:
                    held[_key(action)] = self._accept()
                else:
                    for buffer in held.pop(_key(action)):
                        self._send(buffer, _RETURNED)
                        self.bytes_returned += buffer.numel()
        except BaseException as error:  # handed to the rank's own thread, which raises it
            self._error = error

    def _accept(self) -> list[Tensor]:
        count = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._receive(count, _EVICTED)
        sizes = torch.zeros(int(count), dtype=torch.int64, device=self._device)
        self._receive(sizes, _EVICTED)
        buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes.tolist()]
        for buffer in buffers:
            self._receive(buffer, _EVICTED)
        return buffers

    def _send(self, value: Tensor, tag: int) -> None:
        dist.send(value.to(self._device), self._peer, group=self._group, tag=tag)

    def _receive(self, value: Tensor, tag: int) -> None:
        dist.recv(value, self._peer, group=self._group, tag=tag)


def traffic_of(swap: PeerSwap | None) -> dict[str, float]:
    """Return the bytes a rank has sent to its peer, as a loan or in return; nothing without one."""
    return {} if swap is None else {LENT: float(swap.bytes_lent + swap.bytes_returned)}


def make_swap(schedule: Schedule, topology: Topology, groups: Groups, device: torch.device) -> PeerSwap | None:
    """Return a rank's half of its pair, rank d with rank D - 1 - d, where one of the two evicts; every rank calls this."""
    count = schedule.num_ranks
    moves = [swaps([action for step in schedule.actions(rank) for action in step]) for rank in range(count)]
    if not any(moves):
        return None
    ranks = topology.plan.mapping.pipeline_ranks
    pairs = [pair for d in range(count // 2) for pair in zip(ranks[d], ranks[count - 1 - d], strict=True)]
    group = groups.make_all("peer swap", pairs)
    other = count - 1 - topology.pipeline_rank
    if group is None or not (moves[other] or moves[topology.pipeline_rank]):
        return None
    peer = next(rank for pair in pairs if topology.rank in pair for rank in pair if rank != topology.rank)
    return PeerSwap(group, peer, moves[other], device)


def swaps(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Return the evictions and loads among some actions, in order."""
    return tuple(action for action in actions if action.kind in (Kind.EVICT, Kind.LOAD))


def _key(action: Action) -> UnitKey:
    return (action.replica, action.stage, action.microbatch, action.slice)


def _bytes_of(storage: UntypedStorage, device: torch.device) -> Tensor:
    """Return a storage as bytes, without a copy."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
