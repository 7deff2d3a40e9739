"""Recomputation that makes a rank's layers fit, greedily: the fast half of `recompute`, for incumbents and bounds.

A rank holds slots (virtual stages); slot v has n[v, k] layers of run k, each at one of three levels. With live vectors
(a_v, b_v) of the order, bytes(level) = a kept + b late, every vector must satisfy

    sum_{v, k, level} count * bytes + static + max workspace of the levels in use <= capacity

`fit_rank` raises levels one layer at a time, always where the fullest vector loses most bytes for each second, then
lowers what turned out to be more than needed. `least_seconds` is the linear relaxation for one live vector, a lower
bound on the seconds of any choice: raise fractions of layers along the convex hull of the levels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

_EPSILON = 1e-9


@njit(cache=True, no_cpython_wrapper=True)
def fit_rank(
    layers: Longs,
    recompute_s: Floats,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    allowed: npt.NDArray[np.bool_],
    live: Floats,
    weight: Floats,
    budget: float,
    counts: Longs,
) -> bool:
    """Fill `counts` [V, K, 3] with levels for `layers` [V, K] that fit `budget`; False when the search finds none.

    `kept_bytes`, `late_bytes`, `workspace_bytes` and `recompute_s` are [3, K]; `live` is [vectors, 2, V]; `weight` [V]
    says how much a second costs in each slot.
    """
    slots, runs = layers.shape
    lowest = 0
    while not allowed[lowest]:
        lowest += 1
    counts[:] = 0
    for slot in range(slots):
        for run in range(runs):
            counts[slot, run, lowest] = layers[slot, run]
    used = np.empty(len(live))
    while True:
        room = _fill(counts, kept_bytes, late_bytes, workspace_bytes, live, budget, used)
        if room >= -_EPSILON * abs(budget):
            break
        worst = int(np.argmax(used))
        best, best_slot, best_run, best_from, best_to = -1.0, -1, -1, -1, -1
        for slot in range(slots):
            for run in range(runs):
                for low in range(3):
                    if counts[slot, run, low] == 0:
                        continue
                    for high in range(low + 1, 3):
                        if not allowed[high]:
                            continue
                        saved = live[worst, 0, slot] * (kept_bytes[low, run] - kept_bytes[high, run])
                        saved += live[worst, 1, slot] * (late_bytes[low, run] - late_bytes[high, run])
                        if saved <= 0.0:
                            continue
                        price = weight[slot] * (recompute_s[high, run] - recompute_s[low, run])
                        ratio = saved / max(price, 1e-15)
                        if ratio > best:
                            best, best_slot, best_run, best_from, best_to = ratio, slot, run, low, high
        if best_slot < 0:
            return bool(
                _all_strongest(layers, kept_bytes, late_bytes, workspace_bytes, allowed, live, budget, counts, used)
            )
        saved = live[worst, 0, best_slot] * (kept_bytes[best_from, best_run] - kept_bytes[best_to, best_run])
        saved += live[worst, 1, best_slot] * (late_bytes[best_from, best_run] - late_bytes[best_to, best_run])
        needed = max(1, int(np.ceil(-room / saved - 1e-9)))
        moved = min(counts[best_slot, best_run, best_from], needed)
        counts[best_slot, best_run, best_from] -= moved
        counts[best_slot, best_run, best_to] += moved
    _undo(counts, recompute_s, kept_bytes, late_bytes, workspace_bytes, allowed, live, weight, budget, used)
    return True


@njit(cache=True, no_cpython_wrapper=True)
def fit_replicas(
    layers: Longs,
    recompute_s: Floats,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    state_bytes: Floats,
    allowed: npt.NDArray[np.bool_],
    slot_stage: Longs,
    live: Floats,
    weight: Floats,
    capacity_bytes: float,
    counts: Longs,
) -> bool:
    """Fill `counts` [S, K, 3] where a stage stands on two ranks, which both run its levels; False when none was found.

    `slot_stage` is [D, V] with -1 for no slot, `live` [D, vectors, 2, V]; the fullest rank's need decides each time.
    """
    stages, runs = layers.shape
    lowest = 0
    while not allowed[lowest]:
        lowest += 1
    counts[:] = 0
    for stage in range(stages):
        for run in range(runs):
            counts[stage, run, lowest] = layers[stage, run]
    width = slot_stage.shape[1]
    local = np.zeros((width, runs, 3), dtype=np.int64)
    used = np.empty(live.shape[1])
    for _ in range(2 * layers.sum() + 2):
        least, rank = np.inf, -1
        for other in range(len(slot_stage)):
            budget = capacity_bytes
            for place in range(width):
                stage = slot_stage[other, place]
                for run in range(runs):
                    for level in range(3):
                        local[place, run, level] = counts[stage, run, level] if stage >= 0 else 0
                    if stage >= 0:
                        budget -= layers[stage, run] * state_bytes[run]
            room = _fill(local, kept_bytes, late_bytes, workspace_bytes, live[other], budget, used)
            if room < least:
                least, rank = room, other
        if least >= 0.0:
            return True
        best, best_stage, best_run, best_from, best_to = 0.0, -1, -1, -1, -1
        for place in range(width):
            stage = slot_stage[rank, place]
            if stage < 0:
                continue
            before, behind = live[rank, :, 0, place].max(), live[rank, :, 1, place].max()
            for run in range(runs):
                for low in range(3):
                    if counts[stage, run, low] == 0:
                        continue
                    for high in range(low + 1, 3):
                        if not allowed[high]:
                            continue
                        saved = before * (kept_bytes[low, run] - kept_bytes[high, run])
                        saved += behind * (late_bytes[low, run] - late_bytes[high, run])
                        price = weight[stage] * (recompute_s[high, run] - recompute_s[low, run])
                        ratio = saved / max(price, 1e-15)
                        if ratio > best:
                            best, best_stage, best_run, best_from, best_to = ratio, stage, run, low, high
        if best_stage < 0:
            return False
        counts[best_stage, best_run, best_from] -= 1
        counts[best_stage, best_run, best_to] += 1
    return False


@njit(cache=True, no_cpython_wrapper=True)
def _fill(
    counts: Longs,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    live: Floats,
    budget: float,
    used: Floats,
) -> float:
    """Fill `used` with the bytes of each live vector; return the room left by the fullest one."""
    slots, runs, _ = counts.shape
    most = 0.0
    used[:] = 0.0
    for slot in range(slots):
        kept, late = 0.0, 0.0
        for run in range(runs):
            for level in range(3):
                number = counts[slot, run, level]
                if number > 0:
                    kept += number * kept_bytes[level, run]
                    late += number * late_bytes[level, run]
                    most = max(most, workspace_bytes[level, run])
        for vector in range(len(live)):
            used[vector] += live[vector, 0, slot] * kept + live[vector, 1, slot] * late
    return float(budget - most - used.max())


@njit(cache=True, no_cpython_wrapper=True)
def _all_strongest(
    layers: Longs,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    allowed: npt.NDArray[np.bool_],
    live: Floats,
    budget: float,
    counts: Longs,
    used: Floats,
) -> bool:
    """Try the same level for all layers, the least bytes first; the last resort when the workspace decides."""
    slots, runs = layers.shape
    for level in range(2, -1, -1):
        if not allowed[level]:
            continue
        counts[:] = 0
        for slot in range(slots):
            for run in range(runs):
                counts[slot, run, level] = layers[slot, run]
        if _fill(counts, kept_bytes, late_bytes, workspace_bytes, live, budget, used) >= -_EPSILON * abs(budget):
            return True
    return False


@njit(cache=True, no_cpython_wrapper=True)
def _undo(
    counts: Longs,
    recompute_s: Floats,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    allowed: npt.NDArray[np.bool_],
    live: Floats,
    weight: Floats,
    budget: float,
    used: Floats,
) -> None:
    """Lower levels again while everything still fits, the dearest seconds first."""
    slots, runs, _ = counts.shape
    while True:
        best, best_slot, best_run, best_from, best_to = 0.0, -1, -1, -1, -1
        for slot in range(slots):
            for run in range(runs):
                for high in range(1, 3):
                    if counts[slot, run, high] == 0:
                        continue
                    for low in range(high):
                        gain = weight[slot] * (recompute_s[high, run] - recompute_s[low, run])
                        if not allowed[low] or gain <= best:
                            continue
                        counts[slot, run, high] -= 1
                        counts[slot, run, low] += 1
                        room = _fill(counts, kept_bytes, late_bytes, workspace_bytes, live, budget, used)
                        counts[slot, run, high] += 1
                        counts[slot, run, low] -= 1
                        if room >= 0.0:
                            best, best_slot, best_run, best_from, best_to = gain, slot, run, high, low
        if best_slot < 0:
            return
        counts[best_slot, best_run, best_from] -= 1
        counts[best_slot, best_run, best_to] += 1


@njit(cache=True, no_cpython_wrapper=True)
def least_seconds(
    layers: Floats,
    recompute_s: Floats,
    bytes_each: Floats,
    least_workspace: float,
    budget: float,
) -> float:
    """Return a lower bound on the recompute seconds of `layers` [K] under one live vector; infinite when none fits.

    `bytes_each` [3, K] holds what the live microbatches of one layer keep at each level; levels that are not allowed hold
    infinity. Fractions of layers may be raised, so convex hulls of the levels are followed in order of slope.
    """
    runs = len(layers)
    segments_slope = np.empty(2 * runs)
    segments_saved = np.empty(2 * runs)
    number = 0
    need = least_workspace - budget
    base_s = 0.0
    for run in range(runs):
        if layers[run] <= 0.0:
            continue
        level = 0
        while level < 3 and not np.isfinite(bytes_each[level, run]):
            level += 1
        need += layers[run] * bytes_each[level, run]
        base_s += layers[run] * recompute_s[level, run]
        while True:
            best, target = np.inf, -1
            for high in range(level + 1, 3):
                saved = bytes_each[level, run] - bytes_each[high, run]
                if saved > 0.0:
                    slope = (recompute_s[high, run] - recompute_s[level, run]) / saved
                    if slope < best:
                        best, target = slope, high
            if target < 0:
                break
            segments_slope[number] = best
            segments_saved[number] = layers[run] * (bytes_each[level, run] - bytes_each[target, run])
            number += 1
            level = target
    seconds = base_s
    done = np.zeros(number, dtype=np.bool_)
    for _ in range(number):
        if need <= 0.0:
            break
        chosen = -1
        for index in range(number):
            if not done[index] and (chosen < 0 or segments_slope[index] < segments_slope[chosen]):
                chosen = index
        done[chosen] = True
        taken = min(need, segments_saved[chosen])
        seconds += taken * segments_slope[chosen]
        need -= taken
    return seconds if need <= _EPSILON * max(abs(budget), 1.0) else np.inf
