"""A limit on the tokens that an expert takes: what exceeds it is dropped and passes by the layer on its residual.

Of N tokens with k choices each among E experts, an expert takes C = ceil(cf k N / E), in the order of the choices: all first
choices before all second ones, tokens in their order (GShard). A dropped choice counts nothing in the token's sum. The N
tokens are those of one call, so data-parallel ranks drop as one process does on the same microbatches; a sequence that is
divided (sp, cp) makes the groups smaller.

Papers: Lepikhin et al., GShard, ICLR 2021; Fedus et al., Switch Transformer, JMLR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stagewright.planner.errors import InvalidArgument

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def capacity_of(num_tokens: int, num_choices: int, num_experts: int, factor: float) -> int:
    """Return how many tokens one expert takes."""
    return math.ceil(factor * num_choices * num_tokens / num_experts)


def kept_choices(index: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Return which choices [N, k] of experts find room, bool [N, k]."""
    num_tokens, num_choices = index.shape
    by_choice = index.t().reshape(-1)
    taken = nn.functional.one_hot(by_choice, num_experts)
    before = (torch.cumsum(taken, dim=0) - taken).gather(1, by_choice[:, None]).squeeze(1)
    return (before < capacity).view(num_choices, num_tokens).t()


@dataclass
class Capacity:
    """The limit on one module of experts.

    Parameters
    ----------
    factor : cf.
    forward : the module's forward without a limit.
    num_experts : E.
    num_choices, num_dropped : choices seen and dropped so far.
    """

    factor: float
    forward: Forward
    num_experts: int
    num_choices: int = 0
    num_dropped: int = 0

    def keep(self, index: Tensor) -> Tensor:
        """Return which choices find room, and count the others."""
        capacity = capacity_of(index.shape[0], index.shape[1], self.num_experts, self.factor)
        kept = kept_choices(index, self.num_experts, capacity)
        self.num_choices += index.numel()
        self.num_dropped += int((~kept).sum())
        return kept

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Run the experts; dropped choices weigh nothing."""
        return self.forward(hidden, index, weights * self.keep(index).to(weights.dtype))


def limit_experts(model: nn.Module, factor: float) -> list[Capacity]:
    """Limit all modules of experts, in place, and return their limits; raises InvalidArgument when there are none."""
    found = []
    for module in model.modules():
        if is_experts(module):
            limit = Capacity(factor, module.forward, module.num_experts)
            module.forward = limit
            found.append(limit)
    if not found:
        raise InvalidArgument(
            f"{type(model).__name__} has no experts to limit", field="schedule.parameters.capacity_factor"
        )
    return found


def is_experts(module: nn.Module) -> bool:
    """Return whether a module holds experts: parameters stacked along dimension 0, one row an expert."""
    count = getattr(module, "num_experts", None)
    own = list(module.parameters(recurse=False))
    return (
        isinstance(count, int)
        and bool(own)
        and all(value.dim() >= 2 and value.shape[0] == count for value in own)
        and (max(value.dim() for value in own) >= 3)
    )
