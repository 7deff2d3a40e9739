"""Peak memory of one rank: what it holds all the time and what an iteration adds.

On CPU every allocation of one iteration is counted in order, temporary buffers inside operators included; on CUDA the
allocator's own peak counter is read. Versions of weights come and go within iterations: where there are some, those that
an iteration begins with are not held for all of it, so iterations that renew them go before, and all that is left counts. So it
is with masters that lie on the host in part: a step moves the rest of them, so they are moved before.
Shampoo renews its roots in the measured iteration, as in one of 100.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from stagewright.runtime.piecewise_optimizer import PiecewiseOptimizer
from stagewright.runtime.shampoo import Shampoo
from stagewright.runtime.sharding import ShardedBucket
from stagewright.runtime.torch_adapter import cpu_allocation_changes
from stagewright.runtime.weight_versions import VersionedBucket
from stagewright.runtime.worker import Worker

_RENEWAL = 2  # iterations after which no version of the weights is one from before


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: parameters, gradients and optimizer states that stay, and the peak of everything.

    `host` are those of optimizer states in host memory, which no other number holds.
    """

    parameters: float
    gradients: float
    optimizer: float
    peak: float = 0.0
    host: float = 0.0

    @property
    def states(self) -> float:
        """Sum of what stays."""
        return self.parameters + self.gradients + self.optimizer


def state_memory(worker: Worker) -> RankMemory:
    """Return the bytes of a rank's states between iterations, each storage once."""
    return RankMemory(
        parameters=_bytes(_parameters(worker)),
        gradients=sum(bucket.held_gradient_bytes() for bucket in worker.buckets.buckets),
        optimizer=_bytes(_optimizer_states(worker)),
        host=worker.host_bytes(),
    )


def measure_memory(worker: Worker, work: Callable[[], object], device: torch.device) -> RankMemory:
    """Run one iteration with the optimizers' states in place, the fullest there is; returns what it took.

    Garbage of earlier work is collected first: its release would be taken off what the iteration allocates.
    """
    gc.collect()
    states = state_memory(worker)
    for optimizer in worker.optimizers:
        if isinstance(optimizer, Shampoo):
            optimizer.renew_roots()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return replace(states, peak=float(torch.cuda.max_memory_allocated(device)))
    renewed = {id(value) for bucket in worker.buckets.buckets for value in bucket.renewed}
    sharded = [bucket for bucket in worker.buckets.buckets if isinstance(bucket, ShardedBucket)]
    moved = {id(value) for bucket in sharded for value in bucket.move_masters()}
    parameters = [value for value in _parameters(worker) if id(value) not in renewed]
    staying = [value for value in parameters if id(value) not in moved]
    versioned = [bucket for bucket in worker.buckets.buckets if isinstance(bucket, VersionedBucket)]
    averages = [value for bucket in versioned for value in bucket.averages]
    held = _bytes([*staying, *averages, *(value.grad for value in parameters), *_optimizer_states(worker)])

    def renew() -> None:
        for bucket in sharded:
            bucket.move_masters()
        for _ in range(_RENEWAL if renewed else 0):
            work()

    above = max(accumulate(cpu_allocation_changes(work, before=renew if renewed or moved else None)))
    return replace(states, peak=held + above)


def _parameters(worker: Worker) -> list[Tensor]:
    model = [value for value in worker.chain.model.parameters() if not value.is_meta]
    optimized = [value for bucket in worker.buckets.buckets for value in bucket.optimized()]
    sharded = [bucket.narrow for bucket in worker.buckets.buckets if isinstance(bucket, ShardedBucket)]
    return [*model, *optimized, *(value for value in sharded if value is not None)]


def _optimizer_states(worker: Worker) -> list[object]:
    found: list[object] = []
    for each in worker.optimizers:
        if isinstance(each, PiecewiseOptimizer):
            found += each.held_states()
        else:
            found += [value for state in each.state.values() for value in state.values()]
    return found


def _bytes(values: Sequence[object]) -> float:
    storages = {}
    for value in values:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return float(sum(storages.values()))
