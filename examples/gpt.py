"""A plain GPT and its data: what a model needs so that Stagewright can plan and run it.

    stagewright run examples/gpt.py:build --data examples/gpt.py:data

Nothing here knows of pipelines. `build()` returns the module: its forward takes what `data()` yields and returns the
loss. The repeated blocks stand in one `nn.ModuleList`, so the layers are found without help: the embedding, each block,
the norm, the head and the loss. Heads lie together in the fused projection (heads, 3, size), so that tensor parallelism
can split it; `positions` lets a sequence be run in parts. About 20 million parameters; each byte of the text is a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256  # bytes


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.head_size = width // num_heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        parts = self.queries_keys_values(hidden).view(batch, length, -1, 3, self.head_size)
        queries, keys, values = parts.permute(3, 0, 2, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """Attention and a feed-forward network, each after a norm and around a residual."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden)))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class GPT(nn.Module):
    """A decoder-only transformer over bytes; `tied` shares the embedding with the head."""

    def __init__(
        self,
        *,
        width: int = 512,
        num_blocks: int = 6,
        num_heads: int = 8,
        context: int = 256,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(width, num_heads, dropout) for _ in range(num_blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(_initialise)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.dropout(self.token(tokens) + self.position(positions))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def stagewright_tensor_plan(self) -> dict[str, str]:
        """Say how tensor parallelism splits the model; only needed for that."""
        return {
            "token": "vocabulary",
            "head": "vocabulary",
            "blocks.*.attention.queries_keys_values": "column",
            "blocks.*.attention.output": "row",
            "blocks.*.feed_forward.0": "column",
            "blocks.*.feed_forward.2": "row",
        }


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


def build() -> nn.Module:
    """Return the model; every rank calls this and keeps its own stages."""
    return GPT()


def build_untied() -> nn.Module:
    """Return the model with a head of its own."""
    return GPT(tied=False)


def data(batch_size: int = 16, sequence_length: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (tokens, targets) of random windows of our documentation; every rank yields the same ones."""
    text = torch.frombuffer(bytearray(_documentation()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - sequence_length - 1, (batch_size,), generator=generator)
        windows = torch.stack([text[start : start + sequence_length + 1] for start in starts.tolist()])
        yield windows[:, :-1], windows[:, 1:]


def _documentation() -> bytes:
    root = Path(__file__).resolve().parent.parent
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    text = b"".join(page.read_bytes() for page in pages if page.is_file())
    return text or (__doc__ or "").encode() * 16
