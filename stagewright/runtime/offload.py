"""A tail of a tensor that lies in host memory between steps (Mist).

What is away has no memory on the device: its storage is empty until it is fetched. On a CPU device both memories are the
same kind, and are counted apart all the same.

Papers: Zhu et al., Mist, EuroSys 2025; Ren et al., ZeRO-Offload, USENIX ATC 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Count = Callable[[float], None]


class HostTail:
    """The last elements of a flat tensor that owns its storage, in host memory while they are put away.

    Parameters
    ----------
    count : how many elements.
    copied : told the bytes of each copy.
    """

    def __init__(self, value: Tensor, count: int, copied: Count) -> None:
        self._value = value
        self._kept = value.numel() - count
        self._copied = copied
        self._host = torch.empty(count, dtype=value.dtype, pin_memory=value.device.type == "cuda")
        self._is_here = True

    @property
    def host_bytes(self) -> float:
        """Bytes of host memory."""
        return float(self._host.untyped_storage().nbytes())

    def fetch(self) -> None:
        """Bring the elements to the device, unless they are there."""
        if self._is_here:
            return
        self._value.untyped_storage().resize_(self._value.numel() * self._value.element_size())
        self._value[self._kept :].copy_(self._host)
        self._copied(self.host_bytes)
        self._is_here = True

    def put_away(self) -> None:
        """Bring the elements to the host and free their memory on the device."""
        if not self._is_here:
            return
        self._host.copy_(self._value[self._kept :])
        self._copied(self.host_bytes)
        self._value.untyped_storage().resize_(self._kept * self._value.element_size())
        self._is_here = False


def last_elements(sizes: Sequence[int], count: int) -> list[int]:
    """Return how many elements of each of several tensors are among the last `count` of all of them."""
    found = []
    for size in reversed(sizes):
        found.append(min(size, count))
        count -= found[-1]
    return found[::-1]
