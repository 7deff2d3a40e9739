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

Between 2's way there and back the tensors of each expert may be split over t ranks (expert tensor parallelism, Megatron-Core's
etp): each gathers the rows that the t have got, runs its part of the hidden units, and the partial results are summed and
scattered.

The group may lie across the tensor-parallel one (folding): its ranks hold the same tokens, so each sends its share of them
and the results are gathered; under sequence parallelism they hold different tokens already.

Papers: Lepikhin et al., GShard, ICLR 2021; Fedus et al., Switch Transformer, JMLR 2022; Gale et al., MegaBlocks, 2023; Liu et
al., MoE Parallel Folding, 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.expert_capacity import Capacity, Forward, is_experts
from stagewright.modeling.tensor_collectives import TensorGroup, gather_rows, join, scatter_rows, split
from stagewright.modeling.tensor_parallel import InnerSplit, TensorShards
from stagewright.planner.errors import InvalidArgument

OwnExperts = Callable[[Tensor, Tensor], Tensor]  # of rows [N, h] and the expert of each, [N]


@dataclass(frozen=True)
class ExpertGroups:
    """The ranks that a rank shares its experts with.

    Parameters
    ----------
    experts : those that divide the experts (ep); None where each has all.
    tensors : those that split the tensors of each expert (etp); None where nobody does.
    same_tokens : those that hold copies of this rank's tokens, each of which sends a part of them; None for no copies.
    """

    experts: TensorGroup | None
    tensors: TensorGroup | None = None
    same_tokens: TensorGroup | None = None

    def num_local(self, num_experts: int) -> int:
        """Return the experts of one rank; raises InvalidArgument when the group does not divide them."""
        size = 1 if self.experts is None else self.experts.size
        if num_experts % size:
            raise InvalidArgument(f"{num_experts} experts do not divide over ep = {size} ranks", field="degrees.ep")
        return num_experts // size


def divide_experts(chain: LayerChain, indices: Iterable[int], groups: ExpertGroups, shards: TensorShards) -> set[int]:
    """Divide the experts of the layers over the groups, in place; returns the ids of their parameters.

    Raises
    ------
    InvalidArgument : when the model has no experts, or a group does not divide their number or their tensors.
    """
    if not any(is_experts(module) for module in chain.model.modules()):
        raise InvalidArgument(
            f"{type(chain.model).__name__} has no experts to divide", field="degrees.ep", hint="pin ep=1 and etp=1"
        )
    divided: set[int] = set()
    for index in indices:
        for path in chain.layers[index].modules:
            for module in chain.model.get_submodule(path).modules():
                if is_experts(module):
                    divided |= _divide(module, groups, shards)
    return divided


def _divide(module: nn.Module, groups: ExpertGroups, shards: TensorShards) -> set[int]:
    num_local = groups.num_local(module.num_experts)
    inner = {} if groups.tensors is None else inner_splits(module, groups.tensors)
    divided = set()
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        own = parameter.detach()
        if groups.experts is not None:
            own = own.chunk(groups.experts.size, dim=0)[groups.experts.index]
        if name in inner:
            own = inner[name].part(own)
        made = nn.Parameter(own.clone(), requires_grad=parameter.requires_grad)
        module._parameters[name] = made
        shards.partial.discard(id(parameter))
        if groups.experts is not None:
            shards.dimensions[id(made)] = 0
            shards.groups[id(made)] = groups.experts
        if name in inner:
            shards.inner[id(made)] = inner[name]
        divided.add(id(made))
    module.num_experts = num_local
    limit = module.forward if isinstance(module.forward, Capacity) else None
    forward = partial(_run_own, module.forward if limit is None else limit.forward, module)
    module.forward = partial(_run, forward, groups, num_local, limit)
    return divided


def inner_splits(module: nn.Module, group: TensorGroup) -> dict[str, InnerSplit]:
    """Return how a group splits each parameter of a module of experts along the experts' hidden units.

    The module's `stagewright_expert_plan()` names for each parameter the dimension and how many parts lie along it (two
    where a gate and an up projection are one tensor); Hugging Face's gated experts need none.

    Raises
    ------
    InvalidArgument : when a parameter has no entry, or the group does not divide its hidden units.
    """
    told: Mapping[str, tuple[int, int]] = {}
    if hasattr(module, "stagewright_expert_plan"):
        told = dict(module.stagewright_expert_plan())
    elif isinstance(getattr(module, "intermediate_dim", None), int):
        sizes = {"gate_up_proj": (1, 2), "down_proj": (2, 1)}
        told = {
            name: (dimension, parts)
            for name, (dimension, parts) in sizes.items()
            if name in module._parameters
            and module._parameters[name].shape[dimension] == parts * module.intermediate_dim
        }
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        if name not in told:
            raise InvalidArgument(
                f"{type(module).__name__}.{name} has no place in a plan for the tensors of experts",
                field="degrees.etp",
                hint="give the module stagewright_expert_plan(), which maps names to (dimension, parts), or pin etp=1",
            )
        dimension, parts = told[name]
        if parameter.shape[dimension] % (parts * group.size):
            raise InvalidArgument(
                f"{name} has {parameter.shape[dimension] // parts} hidden units, which etp = {group.size} does not divide",
                field="degrees.etp",
            )
        found[name] = InnerSplit(dimension, (1,) * parts, group)
    return found


def _run(
    forward: OwnExperts,
    groups: ExpertGroups,
    num_local: int,
    limit: Capacity | None,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    kept = torch.ones_like(index, dtype=torch.bool) if limit is None else limit.keep(index)
    same_tokens = groups.same_tokens
    if same_tokens is None:
        return _exchange_and_run(forward, groups, num_local, hidden, index, weights, kept)
    if len(hidden) % same_tokens.size:
        raise InvalidArgument(
            f"{len(hidden)} tokens do not divide over tp = {same_tokens.size} ranks",
            field="degrees.ep",
            hint="take a microbatch and sequence length whose product tp divides",
        )
    index, kept = same_tokens.part(index[None])[0], same_tokens.part(kept[None])[0]
    hidden, weights = split(hidden[None], same_tokens)[0], split(weights[None], same_tokens)[0]
    result = _exchange_and_run(forward, groups, num_local, hidden, index, weights, kept)
    return join(result[None], same_tokens)[0]


def _exchange_and_run(
    forward: OwnExperts,
    groups: ExpertGroups,
    num_local: int,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    kept: Tensor,
) -> Tensor:
    num_tokens, num_choices = index.shape
    chosen = torch.nonzero(kept.reshape(-1)).squeeze(1)
    order = chosen[torch.argsort(index.reshape(-1)[chosen], stable=True)]
    rows, local = hidden[order // num_choices], index.reshape(-1)[order]
    group = groups.experts
    if group is None:
        results = _run_split(forward, groups.tensors, rows, local)
    else:
        outgoing = torch.bincount(local // num_local, minlength=group.size)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group.group)
        there, back = outgoing.tolist(), incoming.tolist()
        rows = _Exchange.apply(rows, there, back, group)
        expert = local.new_empty(sum(back))
        dist.all_to_all_single(expert, local % num_local, back, there, group=group.group)
        results = _Exchange.apply(_run_split(forward, groups.tensors, rows, expert), back, there, group)
    placed = results.new_zeros((num_tokens * num_choices, *results.shape[1:])).index_copy(0, order, results)
    return (placed.view(num_tokens, num_choices, -1) * weights[..., None].to(placed.dtype)).sum(1)


def _run_split(forward: OwnExperts, group: TensorGroup | None, rows: Tensor, expert: Tensor) -> Tensor:
    """Return what the experts make of the rows; with a group, of the rows of all its ranks, each by a part of the tensors."""
    if group is None:
        return forward(rows, expert)
    sizes = [expert.new_empty(1) for _ in range(group.size)]
    dist.all_gather(sizes, expert.new_tensor([len(rows)]), group=group.group)
    counts = [int(size) for size in sizes]
    if not any(counts):
        return forward(rows, expert)
    everyone = TensorGroup(group.group).gather_rows(expert, counts)
    return scatter_rows(forward(gather_rows(rows, counts, group), everyone), counts, group)


def _run_own(forward: Forward, module: nn.Module, rows: Tensor, expert: Tensor) -> Tensor:
    """Return what the rank's own experts make of rows, each by one expert.

    Without rows their gradients are zero, and not none: every rank that owns them is done with them at the same place of its
    backward, where ZeRO scatters them.
    """
    if len(rows):
        return forward(rows, expert[:, None], torch.ones_like(rows[:, :1]))
    parameters = [value for value in module.parameters(recurse=False) if value.requires_grad]
    if not parameters:
        return rows
    return rows + 0.0 * torch.stack([value.reshape(-1)[0] for value in parameters]).sum()


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
