"""Peak memory of one rank: what it holds all the time and what an iteration adds.

On CPU every allocation of one iteration is counted in order, temporary buffers inside operators included; on CUDA the
allocator's own peak counter is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from stagewright.runtime.torch_adapter import cpu_allocation_changes


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: parameters, gradients and optimizer states, and the peak of everything."""

    parameters: float
    gradients: float
    optimizer: float
    peak: float


def measure_memory(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], work: Callable[[], object], device: torch.device
) -> RankMemory:
    """Run one iteration with the optimizers' states in place; returns what it took."""
    parameters = _bytes([value for value in model.parameters() if not value.is_meta])
    states = _bytes(
        [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    )
    gradients = _bytes([value for value in model.parameters() if value.requires_grad and not value.is_meta])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return RankMemory(parameters, gradients, states, float(torch.cuda.max_memory_allocated(device)))
    above = max(accumulate(cpu_allocation_changes(work), initial=0))
    return RankMemory(parameters, gradients, states, parameters + states + above)


def _bytes(values: list[object]) -> float:
    storages = {}
    for value in values:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return float(sum(storages.values()))
