"""Discovery of this machine as a Cluster: every CUDA device, else CPU ranks, one for each core and one thread each.

Rates are measured while all ranks are busy, since that is how a run will find them: the largest matrix product's rate is
the peak and smaller ones give its efficiency curve; memory bandwidth is that of adding one large array into another.
The loopback link comes from the network sweep.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from stagewright.planner.cores import num_cores
from stagewright.planner.documents import Cluster, Device, LinkLevel, NodeGroup, Source
from stagewright.planner.documents.cluster import DType, EfficiencyPoint
from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.network import QUICK_SIZES_BYTES, profile_network
from stagewright.profiler.ranks import RankContext, ReportsProgress, run_ranks
from stagewright.profiler.timing import check_budget, clock_of, time_calls

DeviceChoice = Literal["auto", "cpu", "cuda"]

_CPU_WIDTHS = (64, 128, 256, 512, 768)
_CUDA_WIDTHS = (512, 1024, 2048, 4096, 8192)
_CPU_ARRAY_BYTES = 64 * 2**20
_CUDA_ARRAY_BYTES = 2**30
_TORCH_DTYPES: Mapping[DType, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def discover_local(
    *,
    max_devices: int | None = None,
    device: DeviceChoice = "auto",
    measure_network: bool = True,
    budget_s: float = 10.0,
    progress: ReportsProgress | None = None,
) -> Cluster:
    """Return this machine as a cluster of one group: CUDA devices when there are any, else CPU ranks.

    Parameters
    ----------
    max_devices : use fewer devices than there are.
    measure_network : sweep the links; without it they are one analytic line.
    budget_s : about how long measuring may take.

    Raises
    ------
    InvalidArgument : when CUDA is asked for and absent, or more devices than there are, or the budget is no time.
    """
    check_budget(budget_s)
    num_cuda = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not num_cuda:
        raise InvalidArgument("there is no CUDA device", field="device", hint="discover with the device cpu")
    available = num_cuda or num_cores()
    if max_devices is not None and not 1 <= max_devices <= available:
        raise InvalidArgument(f"{max_devices} devices asked for, {available} are here", field="max_devices")
    count = max_devices or available
    if num_cuda:
        return _discover_cuda(count, measure_network, budget_s, progress)
    return _discover_cpu(count, measure_network, budget_s, progress)


def describe_local(device: DeviceChoice = "auto") -> tuple[str, int]:
    """Return the name and number of the devices `discover_local` would use, without measuring anything."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(0), torch.cuda.device_count()
    return cpu_name(), num_cores()


def cpu_name() -> str:
    """Return the processor's model name, or its architecture when the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine() or "cpu"


def available_memory_bytes() -> int:
    """Return the memory that can still be had here: the least of the system's and the control group's."""
    limits = [_meminfo_bytes("MemAvailable")]
    group = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if group[0] is not None:
        limits.append(group[0] - (group[1] or 0))
    known = [value for value in limits if value]
    return min(known) if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_rank(context: RankContext, device: str, dtypes: Sequence[DType], budget_s: float) -> dict[str, object]:
    """Measure one device's rates; run on every rank at once."""
    torch.set_num_threads(1)
    target = torch.device(device, context.rank) if device == "cuda" else torch.device(device)
    curves: dict[str, list[tuple[float, float]]] = {}
    share_s = budget_s / (len(dtypes) + 1)
    for index, dtype in enumerate(dtypes):
        context.report("devices", index, len(dtypes) + 1)
        curves[dtype] = _matmul_curve(target, _TORCH_DTYPES[dtype], share_s)
    bandwidth = _memory_bytes_per_s(target, share_s)
    context.report("devices", len(dtypes) + 1, len(dtypes) + 1)
    return {"curves": curves, "memory_bytes_per_s": bandwidth}


def discovered_dtypes(kind: Literal["cpu", "cuda"]) -> list[DType]:
    """Return the dtypes whose rates are measured."""
    return ["fp32", "bf16", "fp16"] if kind == "cuda" else ["fp32", "bf16"]


def device_of_ranks(kind: Literal["cpu", "cuda"], devices_per_node: int, rates: list[dict[str, object]]) -> Device:
    """Return this machine's device with the rates that ranks measured; CPU ranks share the machine's memory."""
    if kind == "cpu":
        return _device(cpu_name(), "cpu", available_memory_bytes() / devices_per_node, rates)
    properties = [torch.cuda.get_device_properties(index) for index in range(devices_per_node)]
    return _device(properties[0].name, "cuda", float(min(item.total_memory for item in properties)), rates)


def _discover_cpu(count: int, measure_network: bool, budget_s: float, progress: ReportsProgress | None) -> Cluster:
    rates = _measure(count, "cpu", discovered_dtypes("cpu"), budget_s / 3, progress)
    device = device_of_ranks("cpu", count, rates)
    level = LinkLevel(name="loopback", num_devices=count, latency_s=1e-4, bytes_per_s=1.5e9)
    if measure_network and count > 1:
        network = profile_network(
            count, sizes_bytes=QUICK_SIZES_BYTES, budget_s=budget_s / 2, overlap=True, progress=progress
        )
        level = network.level("loopback", count)
    group = NodeGroup(name="local", device=device, num_nodes=1, devices_per_node=count, links=(level,))
    return Cluster(name="local", groups=(group,))


def _discover_cuda(count: int, measure_network: bool, budget_s: float, progress: ReportsProgress | None) -> Cluster:
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    names = sorted({item.name for item in properties})
    if len(names) > 1:
        raise InvalidArgument(
            f"the CUDA devices differ: {', '.join(names)}",
            field="device",
            hint="choose equal ones with CUDA_VISIBLE_DEVICES; mixed nodes are described in a cluster file",
        )
    rates = _measure(count, "cuda", discovered_dtypes("cuda"), budget_s / 3, progress)
    device = device_of_ranks("cuda", count, rates)
    level = LinkLevel(name="node", num_devices=count, latency_s=1e-5, bytes_per_s=2e10)
    if measure_network and count > 1:
        sizes = tuple(2**power for power in range(10, 29, 2))
        network = profile_network(count, sizes_bytes=sizes, backend="nccl", budget_s=budget_s / 2, progress=progress)
        level = network.level("node", count)
    group = NodeGroup(name="local", device=device, num_nodes=1, devices_per_node=count, links=(level,))
    return Cluster(name="local", groups=(group,))


def _measure(
    count: int, device: str, dtypes: Sequence[DType], budget_s: float, progress: ReportsProgress | None
) -> list[dict[str, object]]:
    arguments = {"device": device, "dtypes": list(dtypes), "budget_s": budget_s}
    results = run_ranks(
        "stagewright.profiler.discover:measure_rank", count, arguments, timeout_s=60 + 10 * budget_s, report=progress
    )
    return [result for result in results if isinstance(result, dict)]


def _device(name: str, kind: Literal["cpu", "cuda"], memory_bytes: float, rows: list[dict[str, object]]) -> Device:
    """Return the device with the rates of the median rank."""
    curves: dict[DType, list[tuple[float, float]]] = {}
    for row in rows:
        measured = row["curves"]
        assert isinstance(measured, dict)
        for dtype, points in measured.items():
            curves.setdefault(dtype, []).extend((float(size), float(rate)) for size, rate in points)
    flops = {dtype: max(_median_by_size(points).values()) for dtype, points in curves.items()}
    main = _median_by_size(curves["bf16" if kind == "cuda" else "fp32"])
    peak = max(main.values())
    bandwidths = [float(str(row["memory_bytes_per_s"])) for row in rows]
    return Device(
        name=name[:200],
        kind=kind,
        memory_bytes=memory_bytes,
        memory_bytes_per_s=statistics.median(bandwidths),
        flops=flops,
        matmul_efficiency=tuple(EfficiencyPoint(size=size, share=rate / peak) for size, rate in sorted(main.items())),
        source=Source.MEASURED,
    )


def _median_by_size(points: list[tuple[float, float]]) -> dict[float, float]:
    by_size: dict[float, list[float]] = {}
    for size, rate in points:
        by_size.setdefault(size, []).append(rate)
    return {size: statistics.median(rates) for size, rates in by_size.items()}


def _matmul_curve(device: torch.device, dtype: torch.dtype, budget_s: float) -> list[tuple[float, float]]:
    """Return (FLOP, FLOP per second) for square products."""
    clock = clock_of(device)
    widths = _CUDA_WIDTHS if device.type == "cuda" else _CPU_WIDTHS
    curve = []
    for width in widths:
        left = torch.ones(width, width, device=device, dtype=dtype)
        right = torch.ones(width, width, device=device, dtype=dtype)
        out = torch.empty(width, width, device=device, dtype=dtype)
        flop = 2.0 * width**3
        inner = max(1, int(2e7 / flop))
        spread = time_calls(
            partial(torch.mm, left, right, out=out),
            clock,
            min_calls=3,
            budget_s=budget_s / len(widths),
            inner=inner,
        )
        curve.append((flop, flop / spread.median_s))
    return curve


def _memory_bytes_per_s(device: torch.device, budget_s: float) -> float:
    """Return bytes read and written per second by an addition in place (two reads, one write)."""
    size = _CUDA_ARRAY_BYTES if device.type == "cuda" else _CPU_ARRAY_BYTES
    left = torch.ones(size // 4, device=device)
    right = torch.ones(size // 4, device=device)
    spread = time_calls(lambda: left.add_(right), clock_of(device), min_calls=3, budget_s=budget_s)
    return 3 * size / spread.median_s


def _meminfo_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(values[0]) * 1024 if values else None


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
