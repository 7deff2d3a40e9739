"""Small models for runs, and their data."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, LENGTH = 36, 8


class TinyAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden):
        batch, length, _ = hidden.shape
        parts = self.inputs(hidden).view(batch, length, -1, 3, 4).permute(3, 0, 2, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))


class TinyBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = TinyAttention(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden):
        hidden = hidden + self.dropout(self.attention(self.norm(hidden)))
        return hidden + self.dropout(self.feed_forward(hidden))


class TinyExperts(nn.Module):
    """Experts with stacked weights, called with what a router chose."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.inner = nn.Parameter(torch.randn(num_experts, width, 2 * width) * 0.2)
        self.outer = nn.Parameter(torch.randn(num_experts, 2 * width, width) * 0.2)

    def stagewright_expert_plan(self):
        return {"inner": (2, 1), "outer": (1, 1)}

    def forward(self, hidden, index, weights):
        result = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, choice = torch.where(index == expert)
            output = functional.gelu(hidden[token] @ self.inner[expert]) @ self.outer[expert]
            result = result.index_add(0, token, output * weights[token, choice, None])
        return result


class TinyMixture(nn.Module):
    """A router and its experts, in place of a feed-forward network."""

    def __init__(self, num_experts: int, num_choices: int, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = TinyExperts(num_experts, width)
        self.num_choices = num_choices

    def forward(self, hidden):
        rows = hidden.flatten(0, 1)
        weights, index = self.router(rows).softmax(-1).topk(self.num_choices)
        return self.experts(rows, index, weights).view_as(hidden)


class TinyModel(nn.Module):
    def __init__(
        self, num_blocks: int, *, tied: bool = True, dropout: float = 0.1, width: int = 16, num_choices: int = 0
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList([TinyBlock(width, dropout) for _ in range(num_blocks)])
        for block in self.blocks if num_choices else ():
            block.feed_forward = TinyMixture(4, num_choices, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.token.weight, std=0.1)
        nn.init.normal_(self.position.weight, std=0.1)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens, targets, positions=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            hidden = block(hidden)
        return functional.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())

    def stagewright_tensor_plan(self):
        return {
            "token": "vocabulary",
            "head": "vocabulary",
            "blocks.*.attention.inputs": "column",
            "blocks.*.attention.output": "row",
            "blocks.*.feed_forward.0": "column",
            "blocks.*.feed_forward.2": "row",
        }


def sequential(num_blocks: int) -> nn.Sequential:
    """A chain whose layers are a sequence's children, for runtimes that take nothing else."""
    torch.manual_seed(5)
    blocks = [TinyBlock(16, 0.0) for _ in range(num_blocks)]
    return nn.Sequential(nn.Embedding(VOCABULARY, 16), *blocks, nn.Linear(16, VOCABULARY))


class Join(nn.Module):
    """What two branches lead to: their mean through a linear map and a loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(2 * width, VOCABULARY)

    def forward(self, first, second):
        return self.map(torch.cat((first, second), dim=-1))


class Entry(nn.Module):
    """The beginning of one branch: an embedding of the tokens, from the left or from the right."""

    def __init__(self, width: int, *, flip: bool) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.flip = flip

    def forward(self, tokens):
        return self.token(tokens.flip(1) if self.flip else tokens)


class TinyBranches(nn.Module):
    """Two branches of an entry and a block each, joined: five layers of which no chain is the graph."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.entries = nn.ModuleList([Entry(width, flip=flip) for flip in (False, True)])
        self.blocks = nn.ModuleList([TinyBlock(width, 0.1) for _ in range(2)])
        self.join = Join(width)

    def stagewright_layers(self):
        return {
            "left": self.entries[0],
            "left-block": self.blocks[0],
            "right": self.entries[1],
            "right-block": self.blocks[1],
            "join": self.join,
        }

    def stagewright_edges(self):
        return [("left", "left-block"), ("left-block", "join"), ("right", "right-block"), ("right-block", "join")]


class TinySkip(nn.Module):
    """An entry, a block, and a layer that joins the block's output with the entry's: a skip connection over a stage."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.entry = Entry(width, flip=False)
        self.block = TinyBlock(width, 0.1)
        self.join = Join(width)

    def stagewright_layers(self):
        return {"entry": self.entry, "block": self.block, "join": self.join}

    def stagewright_edges(self):
        return [("entry", "block"), ("block", "join"), ("entry", "join")]


class BrokenBlock(TinyBlock):
    def forward(self, hidden):
        raise ValueError("broken on purpose")


def build() -> nn.Module:
    return TinyModel(3)


def build_to_die() -> nn.Module:
    """As `build_wide`, on a rank that kills itself in the forward that the environment counts to, once in all attempts."""
    model = build_wide()
    if os.environ["RANK"] == os.environ["DIES_ON_RANK"]:
        numbers = itertools.count(1)
        model.blocks[0].register_forward_pre_hook(lambda _module, _args: _die_once(next(numbers)))
    return model


def _die_once(forward: int) -> None:
    if forward == int(os.environ["DIES_IN_FORWARD"]) and not Path(os.environ["DIES_FILE"]).exists():
        Path(os.environ["DIES_FILE"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def build_to_cut() -> nn.Module:
    """As `build`, on a rank that closes its own connections when the file that the environment names says its number."""
    threading.Thread(
        target=_cut_when_told, args=(Path(os.environ["CUT_FILE"]), os.environ["RANK"]), daemon=True
    ).start()
    return build()


def _cut_when_told(file: Path, rank: str) -> None:
    while not file.exists() or file.read_text() != rank:
        time.sleep(0.02)
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(entry.readlink()).startswith("socket:"):
                socket.socket(fileno=os.dup(int(entry.name))).shutdown(socket.SHUT_RDWR)


def build_wide() -> nn.Module:
    """Wide enough that a profile's bytes are those of tensors and not of odds and ends."""
    return TinyModel(4, tied=False, dropout=0.0, width=256)


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


def halving(step: int) -> float:
    """A learning rate that halves every sixteen steps."""
    return 0.5 ** (step / 16)


def hugging_face(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny Hugging Face model with random weights, and eight samples for it; `type/...` is one of `model_types`."""
    import transformers

    if name.startswith("type/"):
        from model_types import model_of_type

        from stagewright.modeling.guessed_batch import guessed_batch

        model = model_of_type(name.removeprefix("type/"))
        return model, guessed_batch(model, 8, LENGTH)

    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(VOCABULARY, (8, LENGTH), generator=generator)
    text = {"input_ids": tokens, "labels": tokens}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    words = {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
    if name == "llama":
        config = transformers.LlamaConfig(**words, num_key_value_heads=2, pad_token_id=20)  # its row has no gradient
        return transformers.LlamaForCausalLM(config), text
    if name == "mixtral":
        config = transformers.MixtralConfig(**words, num_key_value_heads=2, num_local_experts=4)
        return transformers.MixtralForCausalLM(config), text
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config), text
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**words)), text
    if name == "bert without dropout":
        config = transformers.BertConfig(**words, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return transformers.BertForMaskedLM(config), text
    images = torch.randn(8, 3, 16, 16, generator=generator)
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config), {"pixel_values": images, "labels": torch.arange(8) % 2}
