"""Gradients of many parameters in one flat buffer, the last parameter first, cut into buckets of equal size.

A backward finishes gradients from the last layer to the first, so bucket 0 is complete first. Each parameter's `.grad` is
a view of the buffer: a bucket is reduced where it lies, without a copy. A bucket may begin and end inside a parameter, so
there are exactly ceil(bytes / bucket_bytes) of them.

Paper: Li et al., PyTorch Distributed, VLDB 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20


class GradientBuffer:
    """The gradients of parameters of one dtype.

    Parameters
    ----------
    parameters : in the order of the forward.
    bucket_bytes : size of all buckets but the last.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._parameters = tuple(reversed(parameters))
        first = self._parameters[0]
        self.flat = torch.zeros(
            sum(parameter.numel() for parameter in parameters), dtype=first.dtype, device=first.device
        )
        self._bucket_length = max(1, bucket_bytes // first.element_size())
        self._ends: dict[int, int] = {}
        self._views: list[Tensor] = []
        offset = 0
        for parameter in self._parameters:
            self._views.append(self.flat[offset : offset + parameter.numel()].view(parameter.shape))
            offset += parameter.numel()
            self._ends[id(parameter)] = offset
        self.attach()

    @property
    def num_buckets(self) -> int:
        """How many buckets there are."""
        return math.ceil(self.flat.numel() / self._bucket_length)

    def bucket(self, index: int) -> Tensor:
        """Return one bucket, a view."""
        return self.flat[index * self._bucket_length : (index + 1) * self._bucket_length]

    def attach(self) -> None:
        """Let the parameters' gradients be the buffer; what they had elsewhere is brought in."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
            parameter.grad = view

    def clear(self) -> None:
        """Set all gradients to zero."""
        self.flat.zero_()
        self.attach()

    def num_complete(self, ready: set[int]) -> int:
        """Return how many buckets from the first on hold only gradients of parameters with these ids."""
        end = 0
        for parameter in self._parameters:
            if id(parameter) not in ready:
                return end // self._bucket_length
            end = self._ends[id(parameter)]
        return self.num_buckets
