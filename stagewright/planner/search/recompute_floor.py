"""The least recomputation with which layers fit one rank: exact where all that have a choice are alike, else relaxed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.class_prices import ClassPrices
from stagewright.planner.search.memory_fit import least_seconds

Floats = npt.NDArray[np.float64]

_MOST_ENUMERATED = 24


@njit(cache=True, no_cpython_wrapper=True)
def least_extra(
    number: int, added: int, states: float, taken: Floats, live: float, late: float, prices: ClassPrices
) -> float:
    """Return the least recompute seconds with which a rank's layers fit; infinite when they never do.

    The rank holds `number` layers of class `added` beside those `taken` of each class [C], and `states` bytes for all of
    them; every layer is held by `live` microbatches at once, and by `late` more that wait for their weight gradients.
    """
    classes = len(taken)
    floor, highest = 0.0, 0.0
    full = states
    for kinds in range(classes):
        layers = taken[kinds] + (number if kinds == added else 0)
        if layers <= 0.0:
            continue
        smallest, first = np.inf, True
        for level in range(3):
            if prices.levels[level]:
                smallest = min(smallest, prices.workspace_bytes[level, kinds])
                if first:
                    full += layers * _bytes(level, kinds, live, late, prices)
                    highest = max(highest, prices.workspace_bytes[level, kinds])
                    first = False
        floor = max(floor, smallest)
    if full + highest <= prices.capacity_bytes and prices.levels[0]:
        return 0.0
    number_alike, kind_alike, only_one_kind = 0.0, classes, True
    for kinds in range(classes):
        layers = taken[kinds] + (number if kinds == added else 0)
        if layers > 0.0 and _has_choice(kinds, prices):
            if kind_alike == classes:
                kind_alike = kinds
            if _alike(kinds, kind_alike, prices):
                number_alike += layers
            else:
                only_one_kind = False
    if only_one_kind and kind_alike < classes and number_alike <= _MOST_ENUMERATED:
        others = states
        lowest = 0
        while not prices.levels[lowest]:
            lowest += 1
        for kinds in range(classes):
            layers = taken[kinds] + (number if kinds == added else 0)
            if layers > 0.0 and not _alike(kinds, kind_alike, prices):
                others += layers * _bytes(lowest, kinds, live, late, prices)
        least: float = _least_integer(int(number_alike), kind_alike, others, floor, live, late, prices)
        return least
    return float(_least_relaxed(number, added, states, taken, floor, live, late, prices))


@njit(cache=True, no_cpython_wrapper=True)
def _least_relaxed(
    number: int, added: int, states: float, taken: Floats, floor: float, live: float, late: float, prices: ClassPrices
) -> float:
    """Return `least_extra` with fractions of layers: the largest workspace in use is one of the layers', try each."""
    layers = taken.copy()
    layers[added] += number
    each = np.empty((3, len(layers)))
    best, ceiling = np.inf, floor
    while True:
        for kinds in range(len(layers)):
            for level in range(3):
                each[level, kinds] = np.inf
                if prices.levels[level] and layers[kinds] > 0.0 and prices.workspace_bytes[level, kinds] <= ceiling:
                    each[level, kinds] = _bytes(level, kinds, live, late, prices)
        if ceiling + states <= prices.capacity_bytes:
            best = min(best, least_seconds(layers, prices.recompute_s, each, ceiling, prices.capacity_bytes - states))
        higher = np.inf
        for kinds in range(len(layers)):
            for level in range(3):
                if prices.levels[level] and layers[kinds] > 0.0 and prices.workspace_bytes[level, kinds] > ceiling:
                    higher = min(higher, prices.workspace_bytes[level, kinds])
        if best == 0.0 or not np.isfinite(higher) or higher + states > prices.capacity_bytes:
            return float(best)
        ceiling = higher


@njit(cache=True, no_cpython_wrapper=True)
def _least_integer(
    number: int, kinds: int, fixed: float, floor: float, live: float, late: float, prices: ClassPrices
) -> float:
    """Return the least recompute seconds of `number` equal layers beside `fixed` bytes, by trying every split."""
    none_s, half_s, full_s = prices.recompute_s[0, kinds], prices.recompute_s[1, kinds], prices.recompute_s[2, kinds]
    best = np.inf
    for full in range(number + 1):
        if full > 0 and not prices.levels[2]:
            break
        if full * full_s + (number - full) * min(none_s, half_s) >= best:
            if full_s >= min(none_s, half_s):
                break
            continue
        for half in range(number - full + 1):
            if half > 0 and not prices.levels[1]:
                break
            none = number - full - half
            if none > 0 and not prices.levels[0]:
                continue
            used, seconds, workspace = fixed, 0.0, floor
            for level, count in ((0, none), (1, half), (2, full)):
                if count > 0:
                    used += count * _bytes(level, kinds, live, late, prices)
                    seconds += count * prices.recompute_s[level, kinds]
                    workspace = max(workspace, prices.workspace_bytes[level, kinds])
            if seconds < best and used + workspace <= prices.capacity_bytes:
                best = seconds
            if seconds >= best and half_s >= none_s:
                break
    return best


@njit(cache=True, no_cpython_wrapper=True, inline="always")
def _bytes(level: int, kinds: int, live: float, late: float, prices: ClassPrices) -> float:
    return float(live * prices.kept_bytes[level, kinds] + late * prices.late_bytes[level, kinds])


@njit(cache=True, no_cpython_wrapper=True)
def _has_choice(kinds: int, prices: ClassPrices) -> bool:
    """Tell whether the allowed levels of a class differ in anything."""
    first = -1
    for level in range(3):
        if prices.levels[level]:
            if first < 0:
                first = level
            elif (
                prices.recompute_s[level, kinds] != prices.recompute_s[first, kinds]
                or prices.kept_bytes[level, kinds] != prices.kept_bytes[first, kinds]
                or prices.late_bytes[level, kinds] != prices.late_bytes[first, kinds]
                or prices.workspace_bytes[level, kinds] != prices.workspace_bytes[first, kinds]
            ):
                return True
    return False


@njit(cache=True, no_cpython_wrapper=True)
def _alike(first: int, second: int, prices: ClassPrices) -> bool:
    """Tell whether two classes cost the same at every level."""
    for level in range(3):
        if (
            prices.recompute_s[level, first] != prices.recompute_s[level, second]
            or prices.kept_bytes[level, first] != prices.kept_bytes[level, second]
            or prices.late_bytes[level, first] != prices.late_bytes[level, second]
            or prices.workspace_bytes[level, first] != prices.workspace_bytes[level, second]
        ):
            return False
    return True
