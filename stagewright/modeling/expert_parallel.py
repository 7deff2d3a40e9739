"""Expert parallelism: experts are divided over a group, tokens travel to theirs and back.

Works on any module of experts with the interface that Hugging Face's have: parameters stacked along dimension 0, one row
an expert, `num_experts`, and `forward(hidden [N, h], index [N, k], weights [N, k])`, which returns the weighted sum of
the chosen experts. With E experts over e ranks each rank keeps E / e, and a call

1. sorts the N k (token, choice) pairs by the rank that owns the expert, and tells every rank how many it will get;
2. sends the tokens (all-to-all with uneven parts), runs the rank's own experts on what came, sends the results back;
3. weighs and sums the k results of each token.

Routing is the model's own and sees the rank's tokens only, so any top-k is exact; nothing is dropped but what exceeds a
limit on the experts (`expert_capacity`). Gradients of an expert are summed over the ranks that own it, not over the group.
An imbalanced routing costs time, never correctness.

The group may lie across the tensor-parallel one (folding): its ranks hold the same tokens, so each sends its share of them
and the results are gathered; under sequence parallelism they hold different tokens already.

Papers: Lepikhin et al., GShard, ICLR 2021; Fedus et al., Switch Transformer, JMLR 2022; Gale et al., MegaBlocks, 2023; Liu et
al., MoE Parallel Folding, 2025.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.expert_capacity import Capacity, Forward, is_experts
from stagewright.modeling.tensor_collectives import TensorGroup, join, split
from stagewright.modeling.tensor_parallel import TensorShards
from stagewright.planner.errors import InvalidArgument


def divide_experts(
    chain: LayerChain,
    indices: Iterable[int],
    group: TensorGroup,
    shards: TensorShards,
    *,
    same_tokens: TensorGroup | None = None,
) -> set[int]:
    """Divide the experts of the layers over the group, in place; returns the ids of their parameters.

    `same_tokens` are ranks that hold copies of this rank's tokens, each of which sends a part of them.

    Raises
    ------
    InvalidArgument : when the model has no experts, or the group does not divide their number.
    """
    if not any(is_experts(module) for module in chain.model.modules()):
        raise InvalidArgument(
            f"{type(chain.model).__name__} has no experts to divide", field="degrees.ep", hint="pin ep=1"
        )
    divided: set[int] = set()
    for index in indices:
        for path in chain.layers[index].modules:
            for module in chain.model.get_submodule(path).modules():
                if is_experts(module):
                    divided |= _divide(module, group, shards, same_tokens)
    return divided


def _divide(module: nn.Module, group: TensorGroup, shards: TensorShards, same_tokens: TensorGroup | None) -> set[int]:
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
        shards.partial.discard(id(parameter))
        shards.dimensions[id(made)] = 0
        shards.groups[id(made)] = group
        divided.add(id(made))
    module.num_experts = count // group.size
    limit = module.forward if isinstance(module.forward, Capacity) else None
    forward = module.forward if limit is None else limit.forward
    module.forward = partial(_run, forward, group, count // group.size, same_tokens, limit)
    return divided


def _run(
    forward: Forward,
    group: TensorGroup,
    num_local: int,
    same_tokens: TensorGroup | None,
    limit: Capacity | None,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    kept = torch.ones_like(index, dtype=torch.bool) if limit is None else limit.keep(index)
    if same_tokens is None:
        return _exchange_and_run(forward, group, num_local, hidden, index, weights, kept)
    if len(hidden) % same_tokens.size:
        raise InvalidArgument(
            f"{len(hidden)} tokens do not divide over tp = {same_tokens.size} ranks",
            field="degrees.ep",
            hint="take a microbatch and sequence length whose product tp divides",
        )
    index, kept = same_tokens.part(index[None])[0], same_tokens.part(kept[None])[0]
    hidden, weights = split(hidden[None], same_tokens)[0], split(weights[None], same_tokens)[0]
    result = _exchange_and_run(forward, group, num_local, hidden, index, weights, kept)
    return join(result[None], same_tokens)[0]


def _exchange_and_run(
    forward: Forward,
    group: TensorGroup,
    num_local: int,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    kept: Tensor,
) -> Tensor:
    num_tokens, num_choices = index.shape
    chosen = torch.nonzero(kept.reshape(-1)).squeeze(1)
    order = chosen[torch.argsort(index.reshape(-1)[chosen], stable=True)]
    expert = index.reshape(-1)[order]
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
    placed = results.new_zeros((num_tokens * num_choices, *results.shape[1:])).index_copy(0, order, results)
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
