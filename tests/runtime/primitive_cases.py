"""What the ranks of a pool run to verify a plan's primitives."""

from __future__ import annotations

import torch
import torch.distributed as dist
from runtime_cases import PreparedCase, batches_of, make_model
from runtime_models import TinyAttention, TinyModel
from torch.nn import functional

from stagewright.modeling import split
from stagewright.modeling.tensor_collectives import TensorGroup
from stagewright.runtime.primitives import verify_steps


class ThreeByHead(TinyAttention):
    """A fused projection viewed as [3, heads, size], which columns cannot split."""

    def forward(self, hidden):
        batch, length, _ = hidden.shape
        parts = self.inputs(hidden).view(batch, length, 3, -1, 4).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))


def verified(prepared: PreparedCase) -> list[tuple[str, tuple[int, ...], int, float]]:
    """Kind, layers, number of primitives and error of each step."""
    return _verified(prepared, make_model(prepared.case, prepared.case.num_ranks))


def verified_with_heads_apart(prepared: PreparedCase) -> list[tuple[str, tuple[int, ...], int, float]]:
    """The same of a model whose second block splits wrongly."""
    model = make_model(prepared.case, prepared.case.num_ranks)
    assert isinstance(model, TinyModel)
    model.blocks[1].attention = ThreeByHead(prepared.case.width).to(torch.float64)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    return _verified(prepared, model)


def _verified(prepared: PreparedCase, model: torch.nn.Module) -> list[tuple[str, tuple[int, ...], int, float]]:
    size = prepared.plan.stages[0].degrees.tp
    groups = [dist.new_group(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    group = TensorGroup(groups[dist.get_rank() // size]) if size > 1 else None
    chain, batch = split(model), batches_of(prepared, 1)[0]
    found = verify_steps(prepared.plan, chain, batch, group=group, tolerance=1e-9)
    return [(item.step.kind, item.step.layers, len(item.step.primitives), item.max_relative_error) for item in found]
