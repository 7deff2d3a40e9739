"""Every boundary between layers calls back, whatever tensors come and go between."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch
from torch import nn

from stagewright.modeling import split
from stagewright.profiler.layer_hooks import LayerHooks


def test_an_output_is_not_taken_for_one_that_is_gone():
    """Tensors were told by their `id`, which a later one may have again: now and then a boundary of a Llama in bf16 was missed."""
    left: list[int] = []
    hooks = LayerHooks(split(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))), left=left.append)
    hooks.begin()
    for index in range(100):
        output = torch.ones(2, requires_grad=True) * 2.0
        hooks._watch(index, (output,))
        hooks._watch(index + 1000, (output,))  # a later layer is given it too
        output.sum().backward()
        del output
    assert left == list(range(100))
