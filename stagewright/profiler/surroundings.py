"""What stood around a measurement: device, versions, clocks, and signs that the device was not ours alone.

On CUDA the clocks, temperature, power limit, throttle reasons and foreign processes are read from nvidia-smi where it is
installed. On CPU a rank's CPU time over wall time says how much of its core it had.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from stagewright import __version__
from stagewright.modeling.kept_memory import allocator_name
from stagewright.profiler.discover import cpu_name

_QUERY = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.limit",
    "driver_version",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.sw_thermal_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.sw_power_cap",
)
_MIN_BUSY_SHARE = 0.95
_MAX_DRIFT = 0.1


@dataclass(frozen=True)
class DeviceState:
    """One look at a device."""

    clock_hz: dict[str, float]
    driver: str = ""
    throttle_reasons: tuple[str, ...] = ()
    num_foreign_processes: int = 0


def device_name(device: torch.device) -> str:
    """Return the device's model name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions that decide how fast the same code runs."""
    found = {"stagewright": __version__, "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["transformers"] = importlib.metadata.version("transformers")
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        if torch.distributed.is_nccl_available():
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        found["mkldnn"] = str(torch.backends.mkldnn.is_available()).lower()
        found["allocator"] = allocator_name()
    return found


def device_state(device: torch.device) -> DeviceState:
    """Return clocks and disturbances as they are now; empty where the system does not tell."""
    return _cuda_state(device) if device.type == "cuda" else DeviceState(clock_hz=_cpu_clock_hz())


def disturbances(before: DeviceState, after: DeviceState, busy_shares: list[float], drift: float) -> tuple[str, ...]:
    """Return, in words, what speaks against trusting the measurement."""
    found = [
        f"the device was throttled: {reason}" for reason in sorted({*before.throttle_reasons, *after.throttle_reasons})
    ]
    foreign = max(before.num_foreign_processes, after.num_foreign_processes)
    if foreign:
        found.append(f"{foreign} other processes used the device")
    if busy_shares:
        share = sorted(busy_shares)[len(busy_shares) // 2]
        if share < _MIN_BUSY_SHARE:
            found.append(
                f"the processor was shared: this rank had {share:.0%} of its core; seconds are those of its own time"
            )
    if drift > _MAX_DRIFT:
        found.append(f"speed drifted by {drift:.0%} while measuring")
    return tuple(found)


def _cpu_clock_hz() -> dict[str, float]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    values = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, flags=re.MULTILINE)]
    return {"cpu": max(values) * 1e6} if values else {}


def _cuda_state(device: torch.device) -> DeviceState:
    index = device.index or 0
    fields = ",".join(_QUERY)
    row = _nvidia_smi(f"--query-gpu={fields}", index)
    if len(row) != len(_QUERY):  # newer drivers know the reasons under another name
        row = _nvidia_smi(f"--query-gpu={fields.replace('clocks_throttle', 'clocks_event')}", index)
    if len(row) != len(_QUERY):
        return DeviceState(clock_hz={})
    values = dict(zip(_QUERY, row, strict=True))
    clocks = {
        name: float(values[field]) * 1e6
        for name, field in (("sm", "clocks.sm"), ("sm_max", "clocks.max.sm"), ("memory", "clocks.mem"))
        if values[field].replace(".", "").isdigit()
    }
    reasons = tuple(
        field.removeprefix("clocks_throttle_reasons.").replace("_", " ")
        for field in _QUERY
        if field.startswith("clocks_throttle") and values[field].lower() == "active"
    )
    pids = {int(value) for value in _nvidia_smi("--query-compute-apps=pid", index) if value.isdigit()}
    return DeviceState(clocks, values["driver_version"], reasons, num_foreign(pids))


def num_foreign(pids: set[int]) -> int:
    """Return how many of a device's processes are not this one, which in a container has another number outside."""
    return len(pids - {os.getpid()}) if os.getpid() in pids else max(len(pids) - 1, 0)


def _nvidia_smi(query: str, index: int) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, query, "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for line in text.splitlines() for value in line.split(",")]
