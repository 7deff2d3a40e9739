"""The private names of torch that this package uses, in one place.

Known to work: torch 2.11, 2.12 and 2.13 (tested: 2.13). A name that a version lacks raises here, with the version.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work

from stagewright.modeling.allocations import Change, Mark, mark, watch_allocations

_WORK = "work"
_FLIGHT = "flight "
_NEVER = Mark("", math.inf, math.inf, 0)
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
    the waits for them, are made to return when no other thread holds their tensors (`_collectives_let_go`). What a thread of
    gloo allocates for a collective under way counts from its launch until it is waited for: how early within it comes and
    how soon it goes is chance. With `before`, that is called under watch first, and what it leaves allocated stands in front
    as one change.
    """
    flights = _Flights()

    def watched() -> None:
        if before is not None:
            before()
        with mark(_WORK), _collectives_let_go(flights):
            work()

    watch = watch_allocations(watched)
    (own,) = [each for each in watch.marks if each.name == _WORK]
    flights.note({each.name: each for each in watch.marks if _FLIGHT in each.name})
    changes = flights.stretched(watch.changes, own.thread)
    left = sum(change.size for change in changes if change.time_us < own.begin_us)
    return [left, *(change.size for change in changes if change.time_us >= own.begin_us)]


class _Flights:
    """Collectives under way: what marks their launches and the ends of the waits for them, and the sizes of their tensors."""

    def __init__(self) -> None:
        self._sizes: list[frozenset[int]] = []
        self._spans: list[tuple[float, float, float]] = []  # begin and end of the launch, begin of the landing

    def launch(self, tensors: Sequence[Tensor]) -> int:
        """Take note of one more; returns its number."""
        self._sizes.append(frozenset(value.untyped_storage().nbytes() for value in tensors))
        return len(self._sizes) - 1

    def note(self, marks: Mapping[str, Mark]) -> None:
        """Take note of when marks began and ended."""
        self._spans = []
        for number in range(len(self._sizes)):
            launch = marks.get(_launch_mark(number), _NEVER)
            self._spans.append((launch.begin_us, launch.end_us, marks.get(_landing_mark(number), _NEVER).begin_us))

    def stretched(self, changes: Sequence[Change], own_thread: int) -> list[Change]:
        """Return the changes, in order of time, with those of other threads from the launch to the landing of their flight."""
        moved = list(changes)
        taken: set[int] = set()
        flying: dict[tuple[int, int], list[int]] = {}  # by thread and size: flights whose copy is there
        for place, change in enumerate(changes):
            if change.thread == own_thread:
                continue
            if change.size > 0:
                flight = self._flight_of(change, taken)
                if flight is not None:
                    taken.add(flight)
                    flying.setdefault((change.thread, change.size), []).append(flight)
                    moved[place] = change._replace(time_us=self._spans[flight][1])
            elif flying.get((change.thread, -change.size)):
                landed = self._spans[flying[change.thread, -change.size].pop(0)][2]
                if landed < math.inf:
                    moved[place] = change._replace(time_us=max(landed, change.time_us))
        return sorted(moved, key=lambda change: change.time_us)

    def _flight_of(self, change: Change, taken: set[int]) -> int | None:
        """Return the flight for which a copy was made: the first one under way that has a tensor of its size."""
        under_way = (
            number
            for number, (launched, _, landed) in enumerate(self._spans)
            if launched <= change.time_us <= landed and change.size in self._sizes[number] and number not in taken
        )
        return next(under_way, None)


def _launch_mark(number: int) -> str:
    return f"{_FLIGHT}launch {number}"


def _landing_mark(number: int) -> str:
    return f"{_FLIGHT}landing {number}"


@contextmanager
def _collectives_let_go(flights: _Flights) -> Iterator[None]:
    """Let collectives, and waits for them, return only when no thread of the backend holds their tensors.

    A thread of gloo wakes the caller first and drops its own reference then. On a busy processor the caller is often done
    with the tensor by that time, so that it is freed on gloo's thread, unseen, and would be counted for ever.
    """
    originals = {name: getattr(dist, name) for name in _COLLECTIVES}
    for name, original in originals.items():
        setattr(dist, name, _letting_go(original, flights, copies="gather" in name))
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

    def __init__(self, work: Work, tensors: Sequence[Tensor], num_references: int, number: int) -> None:
        self._work: Work | None = work
        self._tensors = tensors
        self._num_references = num_references
        self._number = number

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
        with mark(_landing_mark(self._number)):
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


def _letting_go(
    collective: Callable[..., Work | None], flights: _Flights, *, copies: bool
) -> Callable[..., Work | _LettingGoWork | None]:
    def call(*args: object, async_op: bool = False, **settings: object) -> Work | _LettingGoWork | None:
        tensors = [value for value in _flat([*args, *settings.values()]) if isinstance(value, Tensor)]
        if async_op:
            held = sum(value._use_count() for value in tensors)
            number = flights.launch(tensors if copies else ())  # other collectives' copies are made on this thread
            with mark(_launch_mark(number)):
                started = collective(*args, async_op=True, **settings)
            return started if started is None else _LettingGoWork(started, tensors, held, number)
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
