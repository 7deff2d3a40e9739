"""The private names of torch that this package uses, in one place.

Known to work: torch 2.11, 2.12 and 2.13 (tested: 2.13). A name that a version lacks raises here, with the version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

_WORK = "stagewright.work"
KNOWN_VERSIONS = ("2.11", "2.12", "2.13")


def default_store() -> dist.Store:
    """Return the store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def cpu_allocation_changes(work: Callable[[], object], *, before: Callable[[], object] | None = None) -> list[int]:
    """Return the sizes of all CPU allocations (positive) and releases (negative) during `work`, in order.

    A release is seen only of what was allocated under watch. With `before`, that is called under watch first, and what it
    leaves allocated stands in front as one change.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        if before is not None:
            before()
        with record_function(_WORK):
            work()
    assert trace.profiler is not None
    results = trace.profiler.kineto_results
    assert results is not None
    events = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    (begin_ns,) = [event.start_ns() for event in results.events() if event.name() == _WORK]
    events.sort(key=lambda event: event[0])
    left = sum(size for time_ns, size in events if time_ns < begin_ns)
    return [left, *(size for time_ns, size in events if time_ns >= begin_ns)]


def pipeline_schedule_runtime(
    stages: list[object],
    num_microbatches: int,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    placement: Mapping[int, int],
    csv: Path,
) -> object:
    """Return torch's runtime of the compute-only schedule in a CSV file."""
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    runtime = _PipelineScheduleRuntime(stages, num_microbatches, loss_fn=loss, scale_grads=True)
    runtime.stage_index_to_group_rank = dict(placement)
    runtime._load_csv(str(csv), format="compute_only")
    return runtime
