"""The example GPT in sizes for runs of random problems, and its data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from examples.gpt import GPT, VOCABULARY

SIZES = {"width": 64, "num_blocks": 4, "num_heads": 4, "context": 32}


def tied() -> GPT:
    """Return the model whose head is its embedding."""
    return GPT(**SIZES)


def untied() -> GPT:
    """Return the model with a head of its own."""
    return GPT(**SIZES, tied=False)


def wide() -> GPT:
    """Return a model whose weights are large beside the activations of a few tokens."""
    return GPT(**{**SIZES, "width": 256}, tied=False)


def data(batch_size: int, sequence_length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of random tokens."""
    generator = torch.Generator().manual_seed(3)
    while True:
        tokens = torch.randint(VOCABULARY, (batch_size, sequence_length + 1), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]
