"""Seeds of layers: random numbers depend on the step, the microbatch and the layer, never on the partition."""

from __future__ import annotations

import torch


def microbatch_seed(seed: int, step: int, microbatch: int) -> int:
    """Return the seed of one microbatch of one step."""
    return (seed * 2_147_483_629 + step * 1_000_033 + microbatch + 1) % (2**63 - 1)


def layer_seed(seed: int, index: int) -> int:
    """Return the seed of one layer under the seed of a microbatch."""
    return (seed * 1_000_003 + 7_919 * (index + 1)) % (2**63 - 1)


def seed_layer(seed: int, index: int) -> None:
    """Seed this process's generators for one layer under the seed of a microbatch.

    `torch.manual_seed` keeps a formatted stack at each call where CUDA was never used, about a millisecond: as much as
    a small layer.
    """
    value = layer_seed(seed, index)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
