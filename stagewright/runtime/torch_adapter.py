"""The private names of torch that this package uses, in one place.

Known to work: torch 2.11, 2.12 and 2.13 (tested: 2.13). A name that a version lacks raises here, with the version.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.profiler import ProfilerActivity, profile

KNOWN_VERSIONS = ("2.11", "2.12", "2.13")


def default_store() -> dist.Store:
    """Return the store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def cpu_allocation_changes(work: Callable[[], object]) -> list[int]:
    """Return the sizes of all CPU allocations (positive) and releases (negative) during `work`, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    assert trace.profiler is not None
    results = trace.profiler.kineto_results
    assert results is not None
    events = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    return [size for _, size in sorted(events, key=lambda event: event[0])]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a distributed tensor, without graph; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.data


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a distributed tensor whole, a collective over its mesh; any other tensor itself."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def local_part(value: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole value that this rank holds of `like`."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)._local_tensor


def with_local_part(local: Tensor, like: Tensor) -> Tensor:
    """Return `local` as a tensor distributed as `like` is; itself when `like` is not."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def set_local_tensor(parameter: nn.Parameter, value: Tensor) -> None:
    """Let a parameter's data, or this rank's part of it, be `value`."""
    if isinstance(parameter, DTensor):
        parameter._local_tensor = value
    else:
        parameter.data = value
