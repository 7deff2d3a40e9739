"""Recomputation runs what it should twice, keeps less, and changes no gradient."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from stagewright.modeling.recomputation import recompute_module  # noqa: E402
from stagewright.planner.documents import Recompute  # noqa: E402


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 24), nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.runs = 0

    def forward(self, hidden):
        self.runs += 1
        query, key, value = self.inner(hidden).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])
        return self.outer(self.dropout(mixed[:, 0]))


def gradients(level):
    torch.manual_seed(0)
    layer = Layer()
    if level is not None:
        recompute_module(layer, level)
    torch.manual_seed(1)
    inputs = torch.randn(2, 6, 8, requires_grad=True)
    layer(inputs).square().sum().backward()
    return [inputs.grad, *(value.grad for value in layer.parameters())], layer.runs


@pytest.mark.parametrize(("level", "runs"), [(Recompute.NONE, 1), (Recompute.SELECTIVE, 1), (Recompute.FULL, 2)])
def test_each_level_replays_dropout_and_gives_the_same_gradients(level, runs):
    expected, _ = gradients(None)
    found, seen = gradients(level)
    assert seen == runs
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


def test_selective_recomputation_runs_attention_and_nothing_else_again(monkeypatch):
    calls = []
    own = functional.linear
    monkeypatch.setattr(functional, "linear", lambda *args: (calls.append(1), own(*args))[1])
    gradients(Recompute.SELECTIVE)
    assert len(calls) == 2
    calls.clear()
    gradients(Recompute.FULL)
    assert len(calls) == 4
