"""Causal attention over a sequence that is run slice by slice.

Queries of slice j attend to keys and values of slices 0 to j. Running slice j therefore needs what the slices before it
kept, and its keys and values receive gradients from every slice after it:

    dK_j = sum over i >= j of dK_j from slice i

Forwards run in order 0 .. K-1 and backwards in order K-1 .. 0, so when slice j's backward begins, the gradients from the
later slices are complete: they are further roots of its backward pass. While a slice runs, calls of
`scaled_dot_product_attention` are taken over: the call's keys and values are kept as leaves for the later slices, and
those of earlier slices are put in front of them, under a mask that is causal over the whole sequence. Models need no
change, except that positions are those of the whole sequence (see `slicing`).

Attention that is written out in other operations is not seen; a segment with blocks in which no call was seen raises.

Papers: Li et al., TeraPipe, ICML 2021; Sun et al., Seq1F1B, NAACL 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from stagewright.modeling.attention_mode import AttentionMode
from stagewright.planner.errors import InvalidArgument


@dataclass
class _Call:
    """One attention call of one slice: the leaves that later slices use, and where their gradients go."""

    keys: Tensor
    values: Tensor
    edges: tuple[GradientEdge | None, GradientEdge | None]


@dataclass
class KeyValueCache:
    """Keys and values of one microbatch on one stage, by slice and call."""

    calls: dict[int, list[_Call]] = field(default_factory=dict)

    def roots(self, slice_index: int) -> tuple[list[GradientEdge], list[Tensor]]:
        """Return the further roots of a slice's backward and their gradients; the slice is then forgotten."""
        edges, gradients = [], []
        for call in self.calls.pop(slice_index, ()):
            for leaf, edge in zip((call.keys, call.values), call.edges, strict=True):
                if leaf.grad is not None and edge is not None:
                    edges.append(edge)
                    gradients.append(leaf.grad)
        return edges, gradients


class SlicedAttention(AttentionMode):
    """While active, attention calls see the earlier slices of the cache; the calls of this slice are added to it.

    Parameters
    ----------
    keep : add the calls; a second run of the same calls does not.
    first : index of the first call that this run makes.
    """

    def __init__(self, cache: KeyValueCache, slice_index: int, *, keep: bool, first: int = 0) -> None:
        super().__init__()
        self._cache = cache
        self._slice = slice_index
        self._keep = keep
        self._first = first
        self._done: list[_Call] = []

    @property
    def num_calls(self) -> int:
        """Attention calls so far."""
        return self._first + len(self._done)

    def again(self) -> SlicedAttention:
        """Return what a second run of the coming calls sees."""
        return SlicedAttention(self._cache, self._slice, keep=False, first=self.num_calls)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, **options: object) -> Tensor:
        """Return the attention of this slice's queries over this slice and those before."""
        if not causal and query.shape[-2] > 1:
            raise InvalidArgument(
                "a schedule with sequence slices needs causal attention",
                field="schedule.num_slices",
                hint="take a schedule without slices for this model",
            )
        index = self.num_calls
        before = [self._cache.calls[earlier][index] for earlier in range(self._slice)]
        if self._keep:
            self._done.append(_kept(key, value))
            self._cache.calls[self._slice] = self._done
        else:
            self._done.append(_Call(key, value, (None, None)))
        keys = torch.cat([*(call.keys for call in before), key], dim=-2)
        values = torch.cat([*(call.values for call in before), value], dim=-2)
        length, total = query.shape[-2], keys.shape[-2]
        mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
        attend: Callable[..., Tensor] = functional.scaled_dot_product_attention
        return attend(query, keys, values, attn_mask=mask, **options)


def _kept(key: Tensor, value: Tensor) -> _Call:
    edges = tuple(get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in (key, value))
    leaves = tuple(
        tensor.detach().requires_grad_(edge is not None) for tensor, edge in zip((key, value), edges, strict=True)
    )
    return _Call(leaves[0], leaves[1], (edges[0], edges[1]))
