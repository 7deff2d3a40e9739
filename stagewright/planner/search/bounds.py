"""Bounds for a whole space at once, before any order is made: they hold for every partition and recomputation.

With t, phi t the seconds of one microbatch over all layers and their forward part, tau the seconds once a step, D ranks,
T microbatches:

    area      (T t + tau) / D                         all work, spread evenly; any order
    layer     T t_l + tau_l                           the longest layer; any order
    uniform   t (T + D - 1) / D                       1F1B with T > D and GPipe: no cut into real-valued stages is better
    rank      t / (1 - q^D),  q = 1 - 1/T             one chunk, full backwards: weighted mean of the path bounds P_r
    split     t / phi' (1 - q^D),  q = 1 - phi / T    one chunk, split backwards, phi' = 1 / phi

P_r: rank r starts after microbatch 0 went through the ranks above, then has T times its own work, and its last backward
goes up again: sum_{s<r} t_s + T t_r <= M. With weights lambda_r = q^(D-1-r) every t_s has the same coefficient, which
gives the rank bound; with split backwards only the forward part of the head counts, which gives the split bound.

Papers: P_r as in DAPPLE (Fan et al., PPoPP 2021); the proof of the uniform bound stands in `docs/search.md`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.pricing import NUM_MICROBATCHES, PP, LayerClasses, Priced

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

UNIFORM, FUSED, SPLIT, CHUNKS, GPIPE, SERIAL, BOTH_WAYS = range(7)

KINDS = {
    "uniform": UNIFORM,
    "fused": FUSED,
    "split": SPLIT,
    "chunks": CHUNKS,
    "gpipe": GPIPE,
    "serial": SERIAL,
    "both ways": BOTH_WAYS,
}


def work_bounds(priced: Priced, classes: LayerClasses, overhead_s: float, step_overhead_s: float) -> Floats:
    """Return the larger of the area bound and half the layer bound of each configuration, [n].

    They hold for any order; half, because two replicas share a layer's microbatches.
    """
    ranks = priced.shape[:, PP].astype(np.float64)
    count = priced.shape[:, NUM_MICROBATCHES].astype(np.float64)
    numbers = classes.counts.astype(np.float64)
    each = priced.time_s
    area = count * (each @ numbers / ranks + 2.0 * overhead_s) + priced.step_s @ numbers / ranks
    layer = (0.5 * count[:, None] * each + priced.step_s).max(axis=1) + count * overhead_s
    return np.asarray(np.maximum(area, layer) + priced.latency_s + step_overhead_s)


def memory_possible(priced: Priced, classes: LayerClasses, capacity_bytes: float, levels: Bools) -> Bools:
    """Return which configurations might fit, [n]: all states and one microbatch's activations over all ranks.

    One microbatch is live on all layers at once, when its last forward ends. Rounding is in favour of fitting.
    """
    allowed = np.flatnonzero(levels)
    numbers = classes.counts.astype(np.float64)
    kept = priced.kept_bytes[:, allowed].min(axis=1)
    ranks = priced.shape[:, PP].astype(np.float64)
    total = (priced.state_bytes + kept) @ numbers
    one = (priced.state_bytes + (priced.kept_bytes + priced.workspace_bytes)[:, allowed].min(axis=1)).max(axis=1)
    room = capacity_bytes * (1 + 1e-9)
    return np.asarray((total <= ranks * room) & (one <= room))


def family_bounds(
    priced: Priced,
    classes: LayerClasses,
    rows: Longs,
    kinds: Longs,
    *,
    work_s: Floats,
    overhead_s: float,
    step_overhead_s: float,
) -> Floats:
    """Return a bound for each (configuration row, kind of family), at least the configuration's work bound."""
    ranks = priced.shape[:, PP].astype(np.float64)
    count = priced.shape[:, NUM_MICROBATCHES].astype(np.float64)
    numbers = classes.counts.astype(np.float64)
    times = priced.time_s
    forward_s = priced.forward_s @ numbers + ranks * overhead_s
    each_s = times @ numbers + 2.0 * ranks * overhead_s
    layer_s = (count[:, None] * times + priced.step_s).max(axis=1) + 2.0 * count * overhead_s
    bounds: Floats = _family_bounds(
        rows, kinds, ranks, count, forward_s, each_s, layer_s, work_s - step_overhead_s, step_overhead_s
    )
    return bounds


@njit(cache=True, error_model="numpy")
def _family_bounds(
    rows: Longs,
    kinds: Longs,
    ranks: Floats,
    count: Floats,
    forward_s: Floats,
    each_s: Floats,
    layer_s: Floats,
    work_s: Floats,
    step_overhead_s: float,
) -> Floats:
    bounds = np.empty(len(rows))
    for index in range(len(rows)):
        row, kind = rows[index], kinds[index]
        bound, each, number, depth = work_s[row], each_s[row], count[row], ranks[row]
        if kind != BOTH_WAYS:
            bound = max(bound, layer_s[row])
        if kind == GPIPE or (kind == UNIFORM and number > depth):
            bound = max(bound, each * (number + depth - 1.0) / depth)
        elif kind in (FUSED, UNIFORM):
            bound = max(bound, each / (1.0 - (1.0 - 1.0 / number) ** depth))
        elif kind == SERIAL:
            bound = max(bound, each * number)
        elif kind == SPLIT:
            share = forward_s[row] / each
            bound = max(bound, each * share / (1.0 - (1.0 - share / number) ** depth))
        bounds[index] = bound + step_overhead_s
    return bounds
