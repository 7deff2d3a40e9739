"""What the gradient of the whole model says of the coming step: as it is, scaled, or not at all.

The squared norms of the ranks are added in one order, those of a pipeline rank's devices first and then pipeline rank by
pipeline rank, so that a norm known all at once and one that travels along the pipeline are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class StepRule:
    """When and how far a step is taken.

    Parameters
    ----------
    clip_norm : largest 2-norm of the gradient of the whole model; None does not clip.
    skip_nonfinite : take no step when a gradient is not finite.
    """

    clip_norm: float | None = None
    skip_nonfinite: bool = False

    @property
    def looks_at_norm(self) -> bool:
        """Whether the norm is needed at all."""
        return self.clip_norm is not None or self.skip_nonfinite

    def factor(self, squared_norm: float) -> float | None:
        """Return what gradients are multiplied with before the step, 1 for as they are; None for no step."""
        if self.skip_nonfinite and not math.isfinite(squared_norm):
            return None
        if self.clip_norm is None:
            return 1.0
        # as torch.nn.utils.clip_grad_norm_ has it
        return min(1.0, self.clip_norm / (math.sqrt(squared_norm) + 1e-6)) if squared_norm == squared_norm else math.nan


def scale_gradients(parameters: Iterable[Tensor], factor: float) -> None:
    """Multiply the gradients of some parameters, where they have any."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def whole_squared_norm(own: float, pipeline_ranks: Sequence[Sequence[int]], device: torch.device) -> float:
    """Return the sum over all ranks; every rank calls this."""
    shares = _gathered(own, dist.group.WORLD, dist.get_world_size(), device)
    total = 0.0
    for ranks in pipeline_ranks:
        total += ordered_sum([shares[rank] for rank in ranks])
    return total


def ordered_sum(values: Sequence[float]) -> float:
    """Return the sum, added from the first value on."""
    total = 0.0
    for value in values:
        total += value
    return total


def pipeline_rank_squared_norm(own: float, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Return the sum over the devices of one pipeline rank, which form the group; None for a single one."""
    return own if group is None else ordered_sum(_gathered(own, group, group.size(), device))


def _gathered(own: float, group: dist.ProcessGroup | None, size: int, device: torch.device) -> list[float]:
    parts = [torch.empty(1, dtype=torch.float64, device=device) for _ in range(size)]
    dist.all_gather(parts, torch.tensor([own], dtype=torch.float64, device=device), group=group)
    return [float(part) for part in parts]
