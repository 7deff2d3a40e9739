"""Attention over a sequence that is divided over ranks: ring attention, Ulysses, and both (USP).

P = u r ranks hold s/P positions each, in any layout: contiguous, striped (round robin) or zigzag.

- Ulysses, groups of u neighbours: an all-to-all turns (all heads, s/P positions) into (1/u of the heads, s/r positions),
  and another one turns the result back.
- Ring, groups of r: keys and values travel round in r - 1 hops; each hop's block attention (O_j, lse_j) is merged into

      lse = log(exp(lse) + exp(lse_j)),   O = exp(lse_old - lse) O + exp(lse_j - lse) O_j

  The backward sends keys and values round again, followed from the second rank on by the gradients that other ranks add,
  which are home after r - 1 hops:

      P_j = exp(S_j - lse),  dV_j += P_j^T dO,  dS_j = P_j * (dO V_j^T - rowsum(dO * O)),  dQ += dS_j K_j,  dK_j += dS_j^T Q

  Neither holds more than one block of scores. A causal mask compares positions, so it holds for every layout; blocks that
  it empties are skipped.

Exact up to the order of sums. Dropout inside attention is refused. O(s^2 / P) work a rank.

Papers: Liu et al., Ring Attention, ICLR 2024; Brandon et al., Striped Attention, 2023; Jacobs et al., DeepSpeed Ulysses,
2023; Fang and Zhao, USP, 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from stagewright.modeling.attention_mode import AttentionMode
from stagewright.planner.errors import InvalidArgument

Layout = Literal["contiguous", "striped", "zigzag"]


def positions_of(index: int, num_parts: int, total: int, layout: Layout) -> Tensor:
    """Return the positions that one rank holds; raises InvalidArgument when the sequence does not divide."""
    parts = 2 * num_parts if layout == "zigzag" else num_parts
    if total % parts:
        raise InvalidArgument(
            f"a sequence of {total} does not divide into {parts} parts", field="degrees.cp", hint="pad the sequence"
        )
    everything = torch.arange(total)
    if layout == "striped":
        return everything[index::num_parts]
    length = total // parts
    if layout == "contiguous":
        return everything[index * length : (index + 1) * length]
    mirror = parts - 1 - index
    return torch.cat(
        (everything[index * length : (index + 1) * length], everything[mirror * length : (mirror + 1) * length])
    )


@dataclass(frozen=True)
class ContextGroups:
    """The groups of one rank: `heads` for Ulysses, `ring` for the ring; None where there is one rank only.

    `traffic` counts bytes sent by operation.
    """

    heads: dist.ProcessGroup | None
    ring: dist.ProcessGroup | None
    traffic: dict[str, float]

    def count(self, operation: str, num_bytes: float) -> None:
        """Add to the traffic."""
        name = f"{operation}/cp"
        self.traffic[name] = self.traffic.get(name, 0.0) + num_bytes


class ContextAttention(AttentionMode):
    """While active, attention calls reach over all ranks of the groups.

    Parameters
    ----------
    positions : for each rank of the ring, the positions that its Ulysses group holds, in the order of its ranks.
    """

    def __init__(self, groups: ContextGroups, positions: list[Tensor]) -> None:
        super().__init__()
        self._groups = groups
        self._positions = positions
        self._num_calls = 0

    @property
    def num_calls(self) -> int:
        """Attention calls so far."""
        return self._num_calls

    def again(self) -> ContextAttention:
        """Return the mode for a second run."""
        return ContextAttention(self._groups, self._positions)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, **options: object) -> Tensor:
        """Return the attention of this rank's queries over the whole sequence."""
        self._num_calls += 1
        if options["dropout_p"]:
            raise InvalidArgument("context parallelism has no dropout inside attention", field="degrees.cp")
        scale = options["scale"]
        factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(str(scale))
        device_type = query.device.type
        if not torch.is_autocast_enabled(device_type):
            return self._over_all(query, key, value, causal, factor)
        with torch.autocast(device_type, enabled=False):  # sums of exponentials over many ranks need the bits
            return self._over_all(query.float(), key.float(), value.float(), causal, factor)

    def _over_all(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, factor: float) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        groups = self._groups
        if groups.heads is not None:
            key, value = _enough_heads(key, groups.heads), _enough_heads(value, groups.heads)
            repeats = query.shape[1] // key.shape[1]
            query, key, value = (_ToHeads.apply(part, groups) for part in (query, key, value))
        output = _Ring.apply(query, key, value, groups, self._positions, causal, factor, repeats)
        return output if groups.heads is None else _ToSequence.apply(output, groups)


def _enough_heads(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return key or value heads repeated until the group divides them."""
    heads, size = value.shape[1], group.size()
    return value if heads % size == 0 else value.repeat_interleave(size // math.gcd(heads, size), dim=1)


class _ToHeads(torch.autograd.Function):
    """[b, h, s/u, d] to [b, h/u, s, d] and, for gradients, back."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, groups: ContextGroups) -> Tensor:
        ctx.groups = groups
        return _exchange(value, groups, to_heads=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.groups, to_heads=False), None


class _ToSequence(torch.autograd.Function):
    """[b, h/u, s, d] to [b, h, s/u, d] and, for gradients, back."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, groups: ContextGroups) -> Tensor:
        ctx.groups = groups
        return _exchange(value, groups, to_heads=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.groups, to_heads=True), None


def _exchange(value: Tensor, groups: ContextGroups, *, to_heads: bool) -> Tensor:
    """Return the value with heads in place of positions divided, or the other way; one all-to-all."""
    assert groups.heads is not None
    size = groups.heads.size()
    split, joined = (1, 2) if to_heads else (2, 1)
    if value.shape[split] % size:
        raise InvalidArgument(
            f"{value.shape[split]} heads do not divide over {size} ranks",
            field="degrees.ulysses",
            hint="take a divisor",
        )
    outgoing = torch.stack([part.contiguous() for part in value.chunk(size, dim=split)])
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=groups.heads)
    groups.count("all-to-all", (size - 1) / size * value.numel() * value.element_size())
    return torch.cat(list(incoming), dim=joined)


class _Ring(torch.autograd.Function):
    """Attention with keys and values that go round; without a ring, one block."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        groups: ContextGroups,
        positions: list[Tensor],
        causal: bool,
        factor: float,
        repeats: int,
    ) -> Tensor:
        size, index = _place(groups.ring)
        output, total = torch.zeros_like(query), query.new_full(query.shape[:-1], -math.inf)
        travelling = torch.stack((key, value)) if key.shape == value.shape else None
        if travelling is None:
            raise InvalidArgument("context parallelism needs keys and values of one shape", field="degrees.cp")
        for hop in range(size):
            source = (index - hop) % size
            mask = _mask(positions[index], positions[source], causal, query.device)
            if mask is None or bool(mask.any()):
                scores = _scores(query, travelling[0], mask, factor, repeats)
                block = torch.logsumexp(scores, dim=-1)
                merged = torch.logaddexp(total, block)
                safe = merged.masked_fill(merged == -math.inf, 0.0)
                weights = torch.exp(scores - safe[..., None])
                output = output * torch.exp(total - safe)[..., None] + weights @ _spread(travelling[1], repeats)
                total = merged
            if hop + 1 < size:
                travelling = _rotate(travelling, groups)
        ctx.save_for_backward(query, key, value, output, total)
        ctx.settings = (groups, positions, causal, factor, repeats)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, total = ctx.saved_tensors
        groups, positions, causal, factor, repeats = ctx.settings
        size, index = _place(groups.ring)
        row = (gradient * output).sum(-1, keepdim=True)
        query_gradient = torch.zeros_like(query)
        travelling = torch.stack((key, value))
        at_home, abroad = torch.zeros_like(travelling), torch.zeros_like(travelling)
        for hop in range(size):
            gradients = abroad if hop else at_home
            source = (index - hop) % size
            mask = _mask(positions[index], positions[source], causal, query.device)
            if mask is None or bool(mask.any()):
                weights = torch.exp(_scores(query, travelling[0], mask, factor, repeats) - total[..., None])
                gradients[1] += _gathered(weights.transpose(-1, -2) @ gradient, repeats)
                inner = weights * (gradient @ _spread(travelling[1], repeats).transpose(-1, -2) - row) * factor
                query_gradient += inner @ _spread(travelling[0], repeats)
                gradients[0] += _gathered(inner.transpose(-1, -2) @ query, repeats)
            if hop + 1 < size:
                travelling = _rotate(travelling, groups)
            if hop:
                abroad = _rotate(abroad, groups)
        key_gradient, value_gradient = at_home + abroad
        return query_gradient, key_gradient, value_gradient, None, None, None, None, None


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (1, 0) if group is None else (group.size(), dist.get_group_rank(group, dist.get_rank()))


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, factor: float, repeats: int) -> Tensor:
    scores = (query @ _spread(key, repeats).transpose(-1, -2)) * factor
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def _mask(queries: Tensor, keys: Tensor, causal: bool, device: torch.device) -> Tensor | None:
    return (queries[:, None] >= keys[None, :]).to(device) if causal else None


def _spread(value: Tensor, repeats: int) -> Tensor:
    """Return key or value heads once for each query head of their group."""
    return value if repeats == 1 else value.repeat_interleave(repeats, dim=1)


def _gathered(value: Tensor, repeats: int) -> Tensor:
    """Return gradients of query heads summed to those of their key or value head."""
    return value if repeats == 1 else value.unflatten(1, (-1, repeats)).sum(2)


def _rotate(value: Tensor, groups: ContextGroups) -> Tensor:
    """Send to the next rank of the ring and return what the one before sent."""
    assert groups.ring is not None
    size, index = _place(groups.ring)
    following = dist.get_global_rank(groups.ring, (index + 1) % size)
    before = dist.get_global_rank(groups.ring, (index - 1) % size)
    incoming = torch.empty_like(value)
    operations = [
        dist.P2POp(dist.isend, value.contiguous(), following, group=groups.ring),
        dist.P2POp(dist.irecv, incoming, before, group=groups.ring),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    groups.count("send-receive", value.numel() * value.element_size())
    return incoming
