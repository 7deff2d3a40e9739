"""Small models for runs, and their data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, LENGTH = 37, 8


class TinyBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden):
        batch, length, width = hidden.shape
        parts = self.attention(self.norm(hidden)).view(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        hidden = hidden + self.dropout(self.output(mixed.transpose(1, 2).reshape(batch, length, width)))
        return hidden + self.dropout(self.outer(functional.gelu(self.inner(hidden))))


class TinyModel(nn.Module):
    def __init__(self, num_blocks: int, *, tied: bool = True, dropout: float = 0.1, width: int = 16) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList([TinyBlock(width, dropout) for _ in range(num_blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens, targets, positions=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            hidden = block(hidden)
        return functional.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())


class BrokenBlock(TinyBlock):
    def forward(self, hidden):
        raise ValueError("broken on purpose")


def build() -> nn.Module:
    return TinyModel(3)


def longer() -> nn.Module:
    return TinyModel(4)


def broken() -> nn.Module:
    model = TinyModel(3)
    model.norm.forward = BrokenBlock(16, 0.0).forward
    return model


def data(batch_size: int, sequence_length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    while True:
        tokens = torch.randint(VOCABULARY, (batch_size, sequence_length + 1), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]
