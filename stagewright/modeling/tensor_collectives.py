"""The collectives of tensor and sequence parallelism as differentiable functions, each with its transpose.

    copy       identity          | all-reduce        into a column-split layer
    reduce     all-reduce        | identity          out of a row-split layer
    gather     all-gather        | reduce-scatter    into a column-split layer, from sequence shards
    scatter    reduce-scatter    | all-gather        out of a row-split layer, to sequence shards
    split      own part          | all-gather        into the sequence-parallel region
    join       all-gather        | own part          out of it, to equal copies
    gather_rows, scatter_rows    gather and scatter along dimension 0, of uneven parts

(forward | backward). Sequences are split along the last dimension but one. All ranks of the group hold equal copies outside.

Papers: Shoeybi et al., Megatron-LM, 2019; Korthikanti et al., MLSys 2023 (sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from stagewright.planner.errors import InvalidArgument


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that split the tensors, and what this one has sent, by operation (ring algorithms)."""

    group: dist.ProcessGroup
    traffic: dict[str, float] = field(default_factory=dict)
    purpose: str = "tp"

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size()

    @property
    def index(self) -> int:
        """This rank's index."""
        return dist.get_group_rank(self.group, dist.get_rank())

    def all_reduce(self, value: Tensor) -> Tensor:
        """Return the sum over the group."""
        result = value.contiguous().clone()
        self.sum_in_place(result)
        return result

    def sum_in_place(self, value: Tensor) -> None:
        """Add up a tensor over the group, where it lies."""
        if value.is_contiguous():
            dist.all_reduce(value, group=self.group)
            self.count_all_reduce(value)
        else:
            value.copy_(self.all_reduce(value))

    def count_all_reduce(self, value: Tensor) -> None:
        """Count what this rank sends when a tensor is summed over the group, whoever does that."""
        self._count("all-reduce", 2 * _bytes(value))

    def all_gather(self, value: Tensor) -> Tensor:
        """Return all parts one behind the other along the last dimension but one."""
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        self._count("all-gather", self.size * _bytes(value))
        return torch.cat(parts, dim=-2)

    def reduce_scatter(self, value: Tensor) -> Tensor:
        """Return this rank's part, along the last dimension but one, of the sum over the group."""
        parts = [part.contiguous() for part in value.chunk(self.size, dim=-2)]
        result = torch.empty_like(parts[0])
        dist.reduce_scatter(result, parts, group=self.group)
        self._count("reduce-scatter", _bytes(value))
        return result

    def gather_rows(self, value: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows of all ranks one behind the other; `counts` are how many each has."""
        padded = value.new_zeros((max(counts), *value.shape[1:]))
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        result = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        self._count("all-gather", _bytes(result))
        return result

    def scatter_rows(self, value: Tensor, counts: Sequence[int]) -> Tensor:
        """Return this rank's rows of the sum over the group of the rows of all ranks."""
        parts = [value.new_zeros((max(counts), *value.shape[1:])) for _ in counts]
        for part, rows in zip(parts, value.split(list(counts)), strict=True):
            part[: len(rows)] = rows
        result = torch.empty_like(parts[0])
        dist.reduce_scatter(result, parts, group=self.group)
        self._count("reduce-scatter", _bytes(value))
        return result[: counts[self.index]]

    def part(self, value: Tensor) -> Tensor:
        """Return this rank's part along the last dimension but one; raises InvalidArgument when it does not divide."""
        if value.shape[-2] % self.size:
            raise InvalidArgument(
                f"{value.shape[-2]} positions do not divide by tp = {self.size}, which sp needs",
                field="degrees.sp",
                hint="take sp off, or a length that tp divides",
            )
        return value.chunk(self.size, dim=-2)[self.index].contiguous()

    def _count(self, operation: str, num_bytes: float) -> None:
        name = f"{operation}/{self.purpose}"
        self.traffic[name] = self.traffic.get(name, 0.0) + num_bytes * (self.size - 1) / self.size


class _Pair(torch.autograd.Function):
    """A function and its transpose."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, value: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


def copy(value: Tensor, group: TensorGroup) -> Tensor:
    """Return the value; its gradient is summed over the group."""
    return _Pair.apply(value, _alias, group.all_reduce)


def reduce(value: Tensor, group: TensorGroup) -> Tensor:
    """Return the sum over the group."""
    return _Pair.apply(value, group.all_reduce, _identity)


def gather(value: Tensor, group: TensorGroup) -> Tensor:
    """Return the whole sequence; gradients of its parts are sums over the group."""
    return _Pair.apply(value, group.all_gather, group.reduce_scatter)


def scatter(value: Tensor, group: TensorGroup) -> Tensor:
    """Return this rank's part of the sequence of the sum over the group."""
    return _Pair.apply(value, group.reduce_scatter, group.all_gather)


def split(value: Tensor, group: TensorGroup) -> Tensor:
    """Return this rank's part of the sequence of equal copies."""
    return _Pair.apply(value, group.part, group.all_gather)


def join(value: Tensor, group: TensorGroup) -> Tensor:
    """Return the whole sequence, an equal copy on every rank."""
    return _Pair.apply(value, group.all_gather, group.part)


def gather_rows(value: Tensor, counts: Sequence[int], group: TensorGroup) -> Tensor:
    """Return the rows of all ranks; gradients of a rank's rows are sums over the group."""
    there, back = partial(group.gather_rows, counts=counts), partial(group.scatter_rows, counts=counts)
    return _Pair.apply(value, there, back)


def scatter_rows(value: Tensor, counts: Sequence[int], group: TensorGroup) -> Tensor:
    """Return this rank's rows of the sum over the group."""
    there, back = partial(group.scatter_rows, counts=counts), partial(group.gather_rows, counts=counts)
    return _Pair.apply(value, there, back)


def _identity(value: Tensor) -> Tensor:
    return value


def _alias(value: Tensor) -> Tensor:
    return value.view_as(value)


def _bytes(value: Tensor) -> float:
    """Return the bytes that travel; none where a layer runs without data to tell the structure of its output."""
    return 0.0 if value.is_meta else float(value.numel() * value.element_size())
