"""Contiguous layers on devices that differ, joined by links that differ: which device takes which stage.

Device k runs layer l in t[k, l] and holds bytes m[l] of it within its memory M_k; a tensor of b[l] bytes behind layer l
crosses from device k to q at c[k, q] seconds a byte. Devices may stay unused. The pipelined bottleneck is minimised,

    max( max over stages of sum t[k, l],  max over boundaries of b[l] c[k, q] ).

Dynamic programme over (devices used, last device, layers placed),

    V(S, k, j) = min over i < j, q in S of  max( V(S - k, q, i),  b[i] c[q, k],  sum_{i <= l < j} t[k, l] )

O(2^K K^2 L^2), exact; `device_assignment_ip` is the same as an integer programme. Papers: HetPipe (Park et al., ATC 2020)
partitions over mixed GPUs in a given order; Pipe-Torch (Zhan and Zhang, CBD 2019) allocates devices to stages over links
of different speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.errors import InvalidArgument

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

MOST_DEVICES = 14


@dataclass(frozen=True, eq=False)
class AssignmentProblem:
    """L layers for K devices.

    Parameters
    ----------
    time_s : [K, L], seconds of a layer on a device.
    layer_bytes : [L], what a device holds of a layer.
    memory_bytes : [K].
    boundary_bytes : [L], the tensor behind each layer; the last one goes nowhere.
    link_s_per_byte : [K, K], from row to column.
    """

    time_s: Floats
    layer_bytes: Floats
    memory_bytes: Floats
    boundary_bytes: Floats
    link_s_per_byte: Floats

    @property
    def num_devices(self) -> int:
        return len(self.time_s)

    @property
    def num_layers(self) -> int:
        return int(self.time_s.shape[1])


@dataclass(frozen=True)
class Assignment:
    """The bottleneck in seconds, its proven bound, and the stages as (device, first layer, end)."""

    bottleneck_s: float
    bound_s: float
    stages: tuple[tuple[int, int, int], ...]


def bottleneck_s(problem: AssignmentProblem, stages: tuple[tuple[int, int, int], ...]) -> float:
    """Return the bottleneck of some stages from the definition; infinite when a device does not hold its layers."""
    worst = 0.0
    for index, (device, first, end) in enumerate(stages):
        if problem.layer_bytes[first:end].sum() > problem.memory_bytes[device] * (1 + 1e-12):
            return float("inf")
        worst = max(worst, float(problem.time_s[device, first:end].sum()))
        if index:
            before = stages[index - 1][0]
            worst = max(worst, float(problem.boundary_bytes[first - 1] * problem.link_s_per_byte[before, device]))
    return worst


def assign(problem: AssignmentProblem) -> Assignment | None:
    """Return the optimal assignment; None when nothing fits. Raises InvalidArgument for more than 14 devices."""
    devices, layers = problem.num_devices, problem.num_layers
    if devices > MOST_DEVICES:
        raise InvalidArgument(
            f"{devices} devices make 2^{devices} sets, the programme takes at most {MOST_DEVICES}",
            field="devices",
            hint="group equal devices, or take device_assignment_ip",
        )
    value, last_device, last_cut = _programme(
        problem.time_s,
        problem.layer_bytes,
        problem.memory_bytes * (1 + 1e-12),
        problem.boundary_bytes,
        problem.link_s_per_byte,
    )
    ends = value[:, :, layers]
    used, device = (int(index) for index in np.unravel_index(int(np.argmin(ends)), ends.shape))
    best = float(ends[used, device])
    if not np.isfinite(best):
        return None
    stages: list[tuple[int, int, int]] = []
    end = layers
    while end:
        first, before = int(last_cut[used, device, end]), int(last_device[used, device, end])
        stages.append((device, first, end))
        used, device, end = used & ~(1 << device), before, first
    return Assignment(best, best, tuple(reversed(stages)))


@njit(cache=True)
def _programme(
    time_s: Floats, layer_bytes: Floats, memory_bytes: Floats, boundary_bytes: Floats, link: Floats
) -> tuple[Floats, Longs, Longs]:
    devices, layers = time_s.shape
    sets = 1 << devices
    value = np.full((sets, devices, layers + 1), np.inf)
    last_device = np.zeros((sets, devices, layers + 1), dtype=np.int64)
    last_cut = np.zeros((sets, devices, layers + 1), dtype=np.int64)
    for used in range(1, sets):
        for k in range(devices):
            if not used >> k & 1:
                continue
            rest = used & ~(1 << k)
            for j in range(1, layers + 1):
                work, held = 0.0, 0.0
                for i in range(j - 1, -1, -1):
                    work += time_s[k, i]
                    held += layer_bytes[i]
                    if held > memory_bytes[k] or work >= value[used, k, j]:
                        break
                    if i == 0:
                        if work < value[used, k, j] and rest == 0:
                            value[used, k, j] = work
                            last_cut[used, k, j] = 0
                        continue
                    for q in range(devices):
                        if not rest >> q & 1:
                            continue
                        here = max(value[rest, q, i], work, boundary_bytes[i - 1] * link[q, k])
                        if here < value[used, k, j]:
                            value[used, k, j] = here
                            last_device[used, k, j] = q
                            last_cut[used, k, j] = i
    return value, last_device, last_cut
