"""The private names of torch that this package uses, in one place.

Known to work: torch 2.11, 2.12 and 2.13 (tested: 2.13). A name that a version lacks raises here, with the version.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile, record_function

_WORK = "stagewright.work"
_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
# Where the system names its threads; elsewhere the pause is what they have to let go of a work.
_THREADS = Path("/proc/self/task")
_GLOO_WORKER = "(pt_gloo_runloop)"
_PAUSE_S = 1e-3
_LONGEST_HOLD_S = 1.0
KNOWN_VERSIONS = ("2.11", "2.12", "2.13")


def default_store() -> dist.Store:
    """Return the store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def cpu_allocation_changes(work: Callable[[], object], *, before: Callable[[], object] | None = None) -> list[int]:
    """Return the sizes of all CPU allocations (positive) and releases (negative) during `work`, in order.

    A release is seen only of what was allocated under watch, and only on this thread and those of autograd: collectives, or
    the waits for them, are made to return when no other thread holds their tensors (`_collectives_let_go`). With `before`, that
    is called under watch first, and what it leaves allocated stands in front as one change.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        if before is not None:
            before()
        with record_function(_WORK), _collectives_let_go():
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


@contextmanager
def _collectives_let_go() -> Iterator[None]:
    """Let collectives, and waits for them, return only when no thread of the backend holds their tensors.

    A thread of gloo wakes the caller first and drops its own reference then. On a busy processor the caller is often done
    with the tensor by that time, so that it is freed on gloo's thread, unseen, and would be counted for ever.
    """
    originals = {name: getattr(dist, name) for name in _COLLECTIVES}
    for name, original in originals.items():
        setattr(dist, name, _letting_go(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


class _LettingGoWork:
    """A collective under way whose `wait` returns when no thread of the backend holds its tensors.

    Others of this process may hold them meanwhile, through the one object that Python has of each: only torch's own
    references are counted.
    """

    def __init__(self, work: Work, tensors: Sequence[Tensor], num_references: int) -> None:
        self._work: Work | None = work
        self._tensors = tensors
        self._num_references = num_references

    def is_completed(self) -> bool:
        """Whether the collective is over."""
        return self._work is None or self._work.is_completed()

    def wait(self) -> bool:
        """Wait for it."""
        if self._work is None:
            return True
        self._work.wait()
        _wait_for_gloo()  # the work holds what gloo made for itself: let its thread drop that first
        self._work = None
        _wait_until(lambda: sum(value._use_count() for value in self._tensors) <= self._num_references)
        self._tensors = ()
        return True


def _wait_until(done: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + _LONGEST_HOLD_S
    while not done() and time.monotonic() < give_up_s:
        time.sleep(0)


def _wait_for_gloo() -> None:
    """Wait until no worker of gloo runs: one that sleeps has dropped the work that it was done with."""
    if _THREADS.is_dir():
        _wait_until(_gloo_sleeps)
    else:
        time.sleep(_PAUSE_S)


def _gloo_sleeps() -> bool:
    for thread in _THREADS.iterdir():
        with suppress(OSError):  # it ended meanwhile
            _, name, state = (thread / "stat").read_text().split(maxsplit=3)[:3]
            if name == _GLOO_WORKER and state == "R":
                return False
    return True


def _letting_go(collective: Callable[..., Work | None]) -> Callable[..., Work | _LettingGoWork | None]:
    def call(*args: object, async_op: bool = False, **settings: object) -> Work | _LettingGoWork | None:
        tensors = [value for value in _flat([*args, *settings.values()]) if isinstance(value, Tensor)]
        if async_op:
            held = sum(value._use_count() for value in tensors)
            started = collective(*args, async_op=True, **settings)
            return started if started is None else _LettingGoWork(started, tensors, held)
        before = _num_references(tensors)
        work = collective(*args, async_op=True, **settings)
        if work is None:
            return None
        work.wait()
        _wait_for_gloo()
        del work
        _wait_until(lambda: _num_references(tensors) <= before)
        return None

    return call


def _num_references(tensors: Sequence[Tensor]) -> int:
    """Return how many references there are to some tensors; torch's last but one is followed by one of Python's."""
    return sum(value._use_count() + sys.getrefcount(value) for value in tensors)


def _flat(values: Sequence[object]) -> Iterator[object]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


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
