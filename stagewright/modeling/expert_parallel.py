"""Expert parallelism, dropless: experts are divided over a group, tokens travel to theirs and back.

Works on any module of experts with the interface that Hugging Face's have: parameters stacked along dimension 0, one row
an expert, `num_experts`, and `forward(hidden [N, h], index [N, k], weights [N, k])`, which returns the weighted sum of
the chosen experts. With E experts over e ranks each rank keeps E / e, and a call

1. sorts the N k (token, choice) pairs by the rank that owns the expert, and tells every rank how many it will get;
2. sends the tokens (all-to-all with uneven parts), runs the rank's own experts on what came, sends the results back;
3. weighs and sums the k results of each token.

Routing is the model's own and sees the rank's tokens only, so any top-k is exact and nothing is dropped. Gradients of an
expert are summed over the ranks that own it, not over the group. An imbalanced routing costs time, never correctness.

Papers: Lepikhin et al., GShard, ICLR 2021; Fedus et al., Switch Transformer, JMLR 2022; Gale et al., MegaBlocks, 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.tensor_collectives import TensorGroup
from stagewright.modeling.tensor_parallel import TensorShards
from stagewright.planner.errors import InvalidArgument

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def divide_experts(chain: LayerChain, indices: Iterable[int], group: TensorGroup, shards: TensorShards) -> set[int]:
    """Divide the experts of the layers over the group, in place; returns the ids of their parameters.

    Raises
    ------
    InvalidArgument : when the model has no experts, or the group does not divide their number.
    """
    if not any(_is_experts(module) for module in chain.model.modules()):
        raise InvalidArgument(
            f"{type(chain.model).__name__} has no experts to divide", field="degrees.ep", hint="pin ep=1"
        )
    divided: set[int] = set()
    for index in indices:
        for path in chain.layers[index].modules:
            for module in chain.model.get_submodule(path).modules():
                if _is_experts(module):
                    divided |= _divide(module, group, shards)
    return divided


def _is_experts(module: nn.Module) -> bool:
    count = getattr(module, "num_experts", None)
    own = list(module.parameters(recurse=False))
    return (
        isinstance(count, int)
        and bool(own)
        and all(value.dim() >= 2 and value.shape[0] == count for value in own)
        and (max(value.dim() for value in own) >= 3)
    )


def _divide(module: nn.Module, group: TensorGroup, shards: TensorShards) -> set[int]:
    count = module.num_experts
    if count % group.size:
        raise InvalidArgument(f"{count} experts do not divide over ep = {group.size} ranks", field="degrees.ep")
    divided = set()
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        own = parameter.detach().chunk(group.size, dim=0)[group.index].clone()
        made = nn.Parameter(own, requires_grad=parameter.requires_grad)
        module._parameters[name] = made
        shards.dimensions[id(made)] = 0
        shards.groups[id(made)] = group
        divided.add(id(made))
    module.num_experts = count // group.size
    module.forward = partial(_run, module.forward, group, count // group.size)
    return divided


def _run(
    forward: Forward, group: TensorGroup, num_local: int, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    num_tokens, num_choices = index.shape
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    expert = flat[order]
    outgoing = torch.bincount(expert // num_local, minlength=group.size)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group.group)
    there, back = outgoing.tolist(), incoming.tolist()
    rows = _Exchange.apply(hidden[order // num_choices], there, back, group)
    local = expert.new_empty(sum(back))
    dist.all_to_all_single(local, expert % num_local, back, there, group=group.group)
    if len(rows):
        rows = forward(rows, local[:, None], torch.ones_like(rows[:, :1]))
    results = _Exchange.apply(rows, back, there, group)
    placed = torch.empty_like(results).index_copy(0, order, results)
    return (placed.view(num_tokens, num_choices, -1) * weights[..., None].to(placed.dtype)).sum(1)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows in uneven parts; gradients go the other way."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, sent: list[int], received: list[int], group: TensorGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: TensorGroup) -> Tensor:
    result = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group.group)
    away = sum(sent) - sent[group.index]
    name = f"all-to-all/{group.purpose}"
    group.traffic[name] = group.traffic.get(name, 0.0) + float(away * rows[:1].numel() * rows.element_size())
    return result
