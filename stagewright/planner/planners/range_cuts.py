"""Cutting a chain into stages by dynamic programmes over range costs: the recurrences that published planners share.

A cost table holds one number for each layer range [i, j), float64 [L + 1, L + 1], infinite where a range is not allowed;
[S, L + 1, L + 1] where it depends on the stage. All functions return a partition 0 = b_0 < ... < b_S = L, or None.

    least_bottleneck   V(s, i) = min over j of max(c_s(i, j), V(s + 1, j))
    least_sum          V(s, i) = min over j of     c_s(i, j) + V(s + 1, j)
    least_sum_and_max  min over t_max of  least sum over ranges of at most t_max, plus weight * t_max

The first two are O(S L^2) and exact. The third takes one of C configurations for each stage, each with its number of
devices, enumerates t_max over the values in the table in ascending order and stops when the weighted t_max alone passes
the best (Zheng et al., OSDI 2022, section 5.2); it is exact as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Cut(NamedTuple):
    """The value of a partition and its bounds."""

    value: float
    bounds: tuple[int, ...]


def least_bottleneck(cost: Floats, num_stages: int) -> Cut | None:
    """Return the partition whose largest range cost is least."""
    return _programme(cost, num_stages, summed=False)


def least_sum(cost: Floats, num_stages: int) -> Cut | None:
    """Return the partition whose range costs have the least sum."""
    return _programme(cost, num_stages, summed=True)


class StagesOnDevices(NamedTuple):
    """The value of a partition onto devices, and for each stage its range and its configuration's index."""

    value: float
    stages: tuple[tuple[int, int, int], ...]

    @property
    def bounds(self) -> tuple[int, ...]:
        return (0, *(end for _, end, _ in self.stages))


def least_sum_and_max(
    cost: Floats,
    devices: Sequence[int],
    num_devices: int,
    weight: float,
    *,
    most_in_flight: Floats | None = None,
) -> StagesOnDevices | None:
    """Return the partition of least sum of stage costs plus `weight` times the largest, on exactly `num_devices`.

    Parameters
    ----------
    cost : [C, L + 1, L + 1], seconds of a range under each of C stage configurations.
    devices : [C], that a stage of each configuration takes.
    most_in_flight : [C, L + 1, L + 1], microbatches that fit; the stage that is s-th from the end keeps s of them.
    """
    limit = np.full(cost.shape, np.inf) if most_in_flight is None else most_in_flight
    sizes = np.asarray(devices, dtype=np.int64)
    best: StagesOnDevices | None = None
    values = np.unique(cost[np.isfinite(cost) & (limit >= 1)])
    low, high = 0, len(values) - 1
    while low < high:  # the least ceiling under which any partition exists
        middle = (low + high) // 2
        if np.isfinite(_sum_under(values[middle], cost, sizes, num_devices, limit)[0]):
            high = middle
        else:
            low = middle + 1
    for ceiling in values[low:].tolist():
        if best is not None and weight * ceiling >= best.value:
            break
        value, rows = _sum_under(ceiling, cost, sizes, num_devices, limit)
        if not np.isfinite(value):
            continue
        stages = tuple((int(row[0]), int(row[1]), int(row[2])) for row in rows)
        largest = max(float(cost[chosen, first, end]) for first, end, chosen in stages)
        if best is None or value + weight * largest < best.value:
            best = StagesOnDevices(value + weight * largest, stages)
    return best


@njit(cache=True)
def _sum_under(ceiling: float, cost: Floats, devices: Ints, num_devices: int, limit: Floats) -> tuple[float, Ints]:
    """Return the least sum of stages of at most `ceiling` on exactly `num_devices`, and its rows (first, end, choice).

    F(s, k, d) = min over i > k and c of cost_c(k, i) + F(s - 1, i, d - devices_c), with s stages left; O(S L^2 C D).
    """
    num_choices, num_layers = cost.shape[0], cost.shape[1] - 1
    most_stages = min(num_layers, num_devices // devices.min())
    value = np.full((most_stages + 1, num_layers + 1, num_devices + 1), np.inf)
    chosen = np.zeros((most_stages + 1, num_layers + 1, num_devices + 1, 2), dtype=np.int64)
    value[0, num_layers, 0] = 0.0
    for left in range(1, most_stages + 1):
        for end in range(num_layers, 0, -1):
            for before in range(num_devices):
                after = value[left - 1, end, before]
                if not np.isfinite(after):
                    continue
                for choice in range(num_choices):
                    total = before + devices[choice]
                    if total > num_devices:
                        continue
                    for first in range(end - 1, -1, -1):
                        own = cost[choice, first, end]
                        if own > ceiling or limit[choice, first, end] < left:
                            continue
                        if own + after < value[left, first, total]:
                            value[left, first, total] = own + after
                            chosen[left, first, total, 0] = end
                            chosen[left, first, total, 1] = choice
    best_left = 0
    best = np.inf
    for left in range(1, most_stages + 1):
        if value[left, 0, num_devices] < best:
            best, best_left = value[left, 0, num_devices], left
    rows = np.zeros((best_left, 3), dtype=np.int64)
    first, total = 0, num_devices
    for stage in range(best_left):
        left = best_left - stage
        rows[stage, 0] = first
        rows[stage, 1] = chosen[left, first, total, 0]
        rows[stage, 2] = chosen[left, first, total, 1]
        total -= devices[rows[stage, 2]]
        first = rows[stage, 1]
    return best, rows


def _programme(cost: Floats, num_stages: int, *, summed: bool) -> Cut | None:
    num_layers = cost.shape[-1] - 1
    value = np.full(num_layers + 1, np.inf)
    value[num_layers] = 0.0
    choices = np.zeros((num_stages, num_layers + 1), dtype=np.int64)
    for stage in range(num_stages - 1, -1, -1):
        table = cost if cost.ndim == 2 else cost[stage]
        through = table + value[None, :] if summed else np.maximum(table, value[None, :])
        choices[stage] = np.argmin(through, axis=1)
        value = through[np.arange(num_layers + 1), choices[stage]]
    if not np.isfinite(value[0]):
        return None
    bounds = [0]
    for stage in range(num_stages):
        bounds.append(int(choices[stage, bounds[-1]]))
    return Cut(float(value[0]), tuple(bounds))
