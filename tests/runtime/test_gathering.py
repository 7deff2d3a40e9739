"""Layers are gathered one by one, once for a forward and once for a backward."""

import pytest

pytest.importorskip("torch")
import torch
from torch import nn

from stagewright.runtime.gathering import GatherWindow


class Bucket:
    """A layer's parameters as the window sees them; it counts how often they come."""

    num_bytes = 1

    def __init__(self):
        self.is_whole = False
        self.num_gathers = 0

    def start_gather(self):
        self.num_gathers += not self.is_whole
        self.is_whole = True

    def wait_gathered(self):
        assert self.is_whole

    def reshard(self):
        self.is_whole = False


class Block(nn.Module):
    """Adds a bias to what it is given and hands the bias on; the first block makes it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden, bias=None):
        bias = self.linear.bias * 2 if bias is None else bias
        return self.linear(hidden) + bias, bias


def test_a_layer_that_hands_on_what_an_earlier_one_made_is_gathered_once_for_its_backward():
    """The gradient of T5's bias of positions is complete behind all blocks but the first; each then came again."""
    blocks, buckets = [Block() for _ in range(3)], [Bucket() for _ in range(3)]
    window = GatherWindow([([bucket], [block]) for bucket, block in zip(buckets, blocks, strict=True)])
    window.begin(1)
    hidden, bias = torch.ones(2, 4, requires_grad=True), None
    for block in blocks:
        hidden, bias = block(hidden, bias)
    window.begin(-1)
    assert [bucket.num_gathers for bucket in buckets] == [1, 1, 2], "the last one is on its way for the backward"
    hidden.sum().backward()
    window.end()
    assert [bucket.num_gathers for bucket in buckets] == [2, 2, 2]
