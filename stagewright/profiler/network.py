"""The network profile: collectives and messages over real groups, fitted piecewise to alpha-beta lines.

Sizes follow the conventions of nccl-tests and of the documents: for all-reduce, all-gather and reduce-scatter the size
is that of the full tensor, for all-to-all one rank's send buffer, for send-receive the message. A time is the slowest
rank's. Bus bandwidth is bytes / seconds times 2 (n - 1) / n for all-reduce, (n - 1) / n for all-gather,
reduce-scatter and all-to-all, and 1 for send-receive.

Where processors carry messages themselves, what one takes of each of its ends is measured in pairs: the processor time of this
process, all its threads, for the same products with and without a message to and from the neighbour. Half the median
difference is one end's, and a line through the sizes gives its two numbers. Time of the process and not of the clock on the
wall: other programs on the same cores would make messages look dear.

The overlap slowdown is the factor by which a matrix product takes longer while this rank's link carries an all-reduce,
and the reverse factor for the all-reduce.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from stagewright.planner.documents import LinkLevel, LinkSegment, Source
from stagewright.planner.errors import RunFailed
from stagewright.profiler.alpha_beta import AlphaBetaFit, fit_alpha_beta
from stagewright.profiler.ranks import RankContext, ReportsProgress, run_ranks

OPERATIONS = ("send-receive", "all-reduce", "all-gather", "reduce-scatter", "all-to-all")
SIZES_BYTES = tuple(2**power for power in range(10, 31))
_ROUNDS = 3
_PROCESSOR_BYTES = (2**10, 2**18, 2**20)
_PROCESSOR_PAIRS, _PROCESSOR_PRODUCTS, _PROCESSOR_WIDTH = 25, 8, 256  # about 5 ms of products each
QUICK_SIZES_BYTES = tuple(2**power for power in (10, 13, 16, 18, 20, 22, 24))


@dataclass(frozen=True)
class NetworkPoint:
    """One measured size of one operation over `num_ranks` ranks."""

    operation: str
    num_ranks: int
    size_bytes: int
    seconds: float
    num_calls: int

    @property
    def bus_bytes_per_s(self) -> float:
        """Bus bandwidth in the convention of nccl-tests."""
        return self.size_bytes / self.seconds * bus_factor(self.operation, self.num_ranks)


@dataclass(frozen=True)
class NetworkProfile:
    """All points of one group of ranks, the fit of each operation, and the overlap factors."""

    num_ranks: int
    points: tuple[NetworkPoint, ...]
    fits: Mapping[str, AlphaBetaFit]
    compute_slowdown: float = 1.0
    communication_slowdown: float = 1.0
    processor_latency_s: float = 0.0
    processor_bytes_per_s: float | None = None

    def level(self, name: str, num_devices: int) -> LinkLevel:
        """Return the link level of a cluster that these numbers describe."""
        sending = self.fits["send-receive"].segments
        return LinkLevel(
            name=name,
            num_devices=num_devices,
            latency_s=sending[0].latency_s,
            bytes_per_s=sending[-1].bytes_per_s,
            segments=sending,
            collectives={name: fit.segments for name, fit in self.fits.items() if name != "send-receive"},
            overlap_slowdown=self.compute_slowdown,
            processor_latency_s=self.processor_latency_s,
            processor_bytes_per_s=self.processor_bytes_per_s,
            source=Source.MEASURED,
        )


def bus_factor(operation: str, num_ranks: int) -> float:
    """Return bus bandwidth over algorithm bandwidth, nccl-tests' convention."""
    if operation == "send-receive":
        return 1.0
    ring = (num_ranks - 1) / num_ranks
    return 2 * ring if operation == "all-reduce" else ring


def profile_network(
    num_ranks: int = 2,
    *,
    operations: Sequence[str] = OPERATIONS,
    sizes_bytes: Sequence[int] = QUICK_SIZES_BYTES,
    backend: str = "gloo",
    budget_s: float = 6.0,
    overlap: bool = True,
    progress: ReportsProgress | None = None,
) -> NetworkProfile:
    """Return the network profile of `num_ranks` local processes (gloo on CPU, nccl with one CUDA device each).

    Raises
    ------
    RunFailed : when a rank fails.
    """
    arguments = {
        "operations": list(operations),
        "sizes_bytes": list(sizes_bytes),
        "backend": backend,
        "budget_s": budget_s,
        "overlap": overlap,
    }
    results = run_ranks(
        "stagewright.profiler.network:sweep_rank", num_ranks, arguments, timeout_s=60 + 10 * budget_s, report=progress
    )
    return network_profile_of(results, num_ranks)


def network_profile_of(results: Sequence[object], num_ranks: int) -> NetworkProfile:
    """Return the profile that the ranks' raw results make: the slowest rank counts.

    Raises
    ------
    RunFailed : when no send-receive was measured.
    """
    rows = [result for result in results if isinstance(result, dict)]
    seconds: dict[tuple[str, int], list[float]] = {}
    calls: dict[tuple[str, int], int] = {}
    for row in rows:
        for operation, size, value, count in row["points"]:
            seconds.setdefault((operation, size), []).append(value)
            calls[operation, size] = count
    points = tuple(
        NetworkPoint(operation, num_ranks, size, max(values), calls[operation, size])
        for (operation, size), values in sorted(seconds.items())
    )
    fits = {
        operation: _fit([point for point in points if point.operation == operation])
        for operation in sorted({point.operation for point in points})
    }
    if "send-receive" not in fits:
        raise RunFailed("the network sweep measured no send-receive", hint="the backend must support send and recv")
    latency_s, rate = _processor_line([point for row in rows for point in row.get("processor", ())])
    return NetworkProfile(
        num_ranks=num_ranks,
        points=points,
        fits=fits,
        compute_slowdown=max([1.0, *(float(row["compute_slowdown"]) for row in rows)]),
        communication_slowdown=max([1.0, *(float(row["communication_slowdown"]) for row in rows)]),
        processor_latency_s=latency_s,
        processor_bytes_per_s=rate,
    )


def _processor_line(points: Sequence[tuple[int, float]]) -> tuple[float, float | None]:
    """Return the line through what an end of a message took, (bytes, seconds) each: latency, and bytes a second.

    Least squares; None where larger messages take no longer.
    """
    if not points:
        return 0.0, None
    sizes, seconds = np.array(points, dtype=np.float64).T
    slope = max(float(np.polyfit(sizes, seconds, 1)[0]), 0.0) if len(set(sizes.tolist())) > 1 else 0.0
    latency_s = max(float((seconds - slope * sizes).mean()), 0.0)
    return latency_s, 1.0 / slope if slope > 0 else None


def _fit(points: Sequence[NetworkPoint]) -> AlphaBetaFit:
    """Fit the points of one operation; a disturbance only adds time, so none may exceed that of a larger message."""
    seconds = [point.seconds for point in points]
    undisturbed = [min(seconds[index:]) for index in range(len(seconds))]
    return fit_alpha_beta([point.size_bytes for point in points], undisturbed)


def sweep_rank(
    context: RankContext,
    operations: Sequence[str],
    sizes_bytes: Sequence[int],
    backend: str,
    budget_s: float,
    overlap: bool,
) -> dict[str, object]:
    """Measure on one local rank; the parent starts all of them."""
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=context.rendezvous, rank=context.rank, world_size=context.num_ranks)
    try:
        return sweep(
            operations, sizes_bytes, device=_rank_device(backend, context.rank), budget_s=budget_s,
            overlap=overlap, progress=context.report,
        )  # fmt: skip
    finally:
        dist.destroy_process_group()


def sweep(
    operations: Sequence[str],
    sizes_bytes: Sequence[int],
    *,
    device: torch.device,
    budget_s: float,
    overlap: bool,
    progress: ReportsProgress,
    group: dist.ProcessGroup | None = None,
) -> dict[str, object]:
    """Return the raw points of this rank over a group (all ranks unless told), which every member must enter together.

    All pairs of operation and size are measured in each of three rounds, so that a disturbance does not fall on one.
    """
    num_ranks = dist.get_world_size(group)
    calls = {
        (operation, size): _call(operation, size, group, device) for operation in operations for size in sizes_bytes
    }
    usable = {key: call for key, call in calls.items() if call is not None}
    share_s = budget_s / max(len(usable), 1) / _ROUNDS
    counts: dict[tuple[str, int], int] = {}
    samples: dict[tuple[str, int], list[float]] = {}
    for index in range(_ROUNDS):
        for position, (key, call) in enumerate(usable.items()):
            progress("network", index * len(usable) + position, _ROUNDS * len(usable))
            counts[key] = counts.get(key) or _calls_within(call, share_s, device, group)
            samples.setdefault(key, []).extend(_time_together(call, counts[key], device))
    progress("network", _ROUNDS * len(usable), _ROUNDS * len(usable))
    points = [
        (*key, statistics.median(values) / (2 if key[0] == "send-receive" else 1), len(values))
        for key, values in samples.items()
    ]
    compute, communication = _overlap(device, group) if overlap and num_ranks > 1 else (1.0, 1.0)
    processor = _processor_points(device, group) if overlap and device.type == "cpu" and num_ranks > 1 else []
    return {
        "points": points,
        "compute_slowdown": compute,
        "communication_slowdown": communication,
        "processor": processor,
    }


def _rank_device(backend: str, rank: int) -> torch.device:
    if backend != "nccl":
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _call(
    operation: str, size_bytes: int, group: dist.ProcessGroup | None, device: torch.device
) -> Callable[[], object] | None:
    """Return one call of the operation (a round trip for send-receive), or None when this group cannot do it."""
    num_ranks = dist.get_world_size(group)
    count = max(size_bytes // 4 // num_ranks, 1) * num_ranks
    full = torch.zeros(count, device=device)
    if operation == "send-receive":
        return _round_trip(torch.zeros(max(size_bytes // 4, 1), device=device), group)
    part = torch.zeros(count // num_ranks, device=device)
    other = torch.zeros(count, device=device)
    calls: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(full, group=group),
        "all-gather": lambda: dist.all_gather_into_tensor(full, part, group=group),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, full, group=group),
        "all-to-all": lambda: dist.all_to_all_single(other, full, group=group),
    }
    call = calls[operation]
    try:
        call()
    except (RuntimeError, NotImplementedError):
        return None
    return call


def _round_trip(message: torch.Tensor, group: dist.ProcessGroup | None) -> Callable[[], object]:
    """Between neighbours (0, 1), (2, 3), ... all pairs at once; a rank without neighbour stays out."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    other = rank ^ 1
    peer = other if group is None or other >= num_ranks else dist.get_global_rank(group, other)

    def call() -> None:
        if other >= num_ranks:
            return
        if rank < other:
            dist.send(message, peer, group=group)
            dist.recv(message, peer, group=group)
        else:
            dist.recv(message, peer, group=group)
            dist.send(message, peer, group=group)

    return call


def _calls_within(
    call: Callable[[], object], budget_s: float, device: torch.device, group: dist.ProcessGroup | None
) -> int:
    """Return how many calls fit; the ranks agree on the count, so that none waits for another."""
    call()
    _synchronize(device)
    first = time.perf_counter()
    call()
    _synchronize(device)
    guess = torch.tensor([max(time.perf_counter() - first, 1e-6)], dtype=torch.float64, device=device)
    dist.all_reduce(guess, op=dist.ReduceOp.MAX, group=group)
    return int(min(max(budget_s / float(guess.item()), 2), 200))


def _time_together(call: Callable[[], object], num_calls: int, device: torch.device) -> list[float]:
    samples = []
    for _ in range(num_calls):
        first = time.perf_counter()
        call()
        _synchronize(device)
        samples.append(time.perf_counter() - first)
    return samples


def _overlap(device: torch.device, group: dist.ProcessGroup | None) -> tuple[float, float]:
    """Return (compute, communication) slowdown while the other runs all the time, at least 1 each."""
    width = 512 if device.type == "cpu" else 8192
    left = torch.ones(width, width, device=device)
    message = torch.zeros(2**22 // 4 if device.type == "cpu" else 2**28 // 4, device=device)

    def compute() -> None:
        torch.mm(left, left)
        _synchronize(device)

    def communicate() -> None:
        dist.all_reduce(message, group=group)

    compute_alone: list[float] = []
    communication_alone: list[float] = []
    compute_busy: list[float] = []
    communication_busy: list[float] = []
    pending = 1 + _calls_within(communicate, 0.03, device, group)
    products = 1 + _calls_within(compute, 0.06, device, group)
    for _ in range(4):
        compute_alone += _time_together(compute, 5, device)
        communication_alone += _time_together(communicate, 5, device)
        dist.barrier(group=group)
        works = [dist.all_reduce(message, group=group, async_op=True) for _ in range(pending)]
        while not works[-1].is_completed() and len(compute_busy) < 1000:
            compute_busy += _time_together(compute, 1, device)
        for work in works:
            work.wait()
        dist.barrier(group=group)
        start = time.perf_counter()
        work = dist.all_reduce(message, group=group, async_op=True)
        for _ in range(products):
            if work.is_completed():
                break
            compute()
        work.wait()
        _synchronize(device)
        communication_busy.append(time.perf_counter() - start)
    compute_factor = statistics.median(compute_busy or [0.0]) / statistics.median(compute_alone)
    communication_factor = statistics.median(communication_busy) / statistics.median(communication_alone)
    return max(1.0, compute_factor), max(1.0, communication_factor)


def _processor_points(device: torch.device, group: dist.ProcessGroup | None) -> list[tuple[int, float]]:
    """Return by size what a message takes of the processor at one of its ends, seconds; nothing of a rank without neighbour."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    other = rank ^ 1
    peer = other if group is None or other >= num_ranks else dist.get_global_rank(group, other)
    left = torch.ones(_PROCESSOR_WIDTH, _PROCESSOR_WIDTH, device=device)
    found = []
    for size in _PROCESSOR_BYTES:
        sent, received = torch.zeros(size // 4, device=device), torch.empty(size // 4, device=device)
        differences = []
        for _ in range(_PROCESSOR_PAIRS):
            seconds = []
            for with_message in (False, True):
                dist.barrier(group=group)
                begin = time.process_time()
                works: list[dist.Work | None] = []
                if with_message and other < num_ranks:
                    works = [dist.irecv(received, peer, group=group), dist.isend(sent, peer, group=group)]
                for _ in range(_PROCESSOR_PRODUCTS):
                    torch.mm(left, left)
                for work in works:
                    assert work is not None
                    work.wait()
                seconds.append(time.process_time() - begin)
            differences.append(seconds[1] - seconds[0])
        found.append((size, max(statistics.median(differences), 0.0) / 2))
    return found if other < num_ranks else []


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def segment_seconds(segments: Sequence[LinkSegment], size_bytes: float) -> float:
    """Return the time of one message on piecewise lines."""
    chosen = [segment for segment in segments if segment.from_bytes <= size_bytes] or [segments[0]]
    return chosen[-1].latency_s + size_bytes / chosen[-1].bytes_per_s
