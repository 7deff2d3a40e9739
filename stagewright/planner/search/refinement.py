"""Bounds raised to what caps and memory over time show, before any order is made, for many candidates at once.

For each candidate targets are bisected: one that `rank_reach` or `byte_seconds` does not leave possible is a bound.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.cores import num_cores
from stagewright.planner.search.byte_seconds import pool_admits
from stagewright.planner.search.class_prices import ClassPrices, prices_of
from stagewright.planner.search.pricing import NUM_MICROBATCHES, PP
from stagewright.planner.search.rank_reach import reaches

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

LIVE = {"one": 0, "all": 1, "depth": 2, "double": 3, "group": 4}
LEAST_SHARED = 256  # candidates refined at once that are worth threads


class Outlines(NamedTuple):
    """What a bound sees of n candidates: the row of the configuration and the rules of the family, arrays [n].

    `kinds` are values of KINDS, `live` of LIVE.
    """

    rows: Longs
    kinds: Longs
    live: Longs
    chunks: Longs
    replicas: Longs
    splits: npt.NDArray[np.bool_]


def taken(outlines: Outlines, at: Longs) -> Outlines:
    """Return some of the candidates."""
    return Outlines._make(column[at] for column in outlines)


def refined(low_s: Floats, high_s: float, steps: int, outlines: Outlines, shape: Ints, table: ClassPrices) -> Floats:
    """Return for each candidate the least target its caps reach, to 2^-steps of the interval; infinity above `high_s`.

    The value returned is one that the caps do *not* reach, hence a bound; `low_s` where even that is reached. Shared out
    among the cores.
    """

    def part_of(at: Longs) -> Floats:
        found: Floats = _refined(low_s[at], high_s, steps, taken(outlines, at), shape, table)
        return found

    if len(low_s) < LEAST_SHARED:
        return part_of(np.arange(len(low_s)))
    number = num_cores()
    parts = [np.arange(first, len(low_s), number) for first in range(number)]
    found = np.empty(len(low_s))
    with ThreadPoolExecutor(number) as pool:  # compiled code without the interpreter's lock
        for part, values in zip(parts, pool.map(part_of, parts), strict=True):
            found[part] = values
    return found


@njit(cache=True, nogil=True)
def _refined(low_s: Floats, high_s: float, steps: int, outlines: Outlines, shape: Ints, table: ClassPrices) -> Floats:
    result = np.empty(len(low_s))
    for index in range(len(low_s)):
        row = outlines.rows[index]
        ranks, count = np.int64(shape[row, PP]), np.int64(shape[row, NUM_MICROBATCHES])
        prices = prices_of(table, row)
        live, late = np.empty(int(ranks)), np.zeros(int(ranks))
        hops = np.zeros(max(int(ranks) - 1, 0))
        for rank in range(ranks):
            live[rank] = _live(outlines.live[index], rank, ranks, count)
        low, high = low_s[index], high_s
        reached = False
        for step in range(steps + 1):
            target = high if step == 0 else 0.5 * (low + high)
            if pool_admits(target, ranks, count, outlines.replicas[index], outlines.splits[index], prices) and reaches(
                target, outlines.kinds[index], ranks, count, outlines.chunks[index], hops, live, late, prices
            ):
                reached, high = True, target
            elif step == 0:
                break
            else:
                low = target
        result[index] = low if reached else np.inf
    return result


@njit(cache=True, no_cpython_wrapper=True)
def _live(code: int, rank: int, num_ranks: int, num_microbatches: int) -> float:
    """Return the least microbatches every chunk of a rank holds at once, by the code of LIVE."""
    left = num_ranks - rank
    if code == 1:
        return float(num_microbatches)
    if code == 2:
        return float(min(left, num_microbatches))
    if code == 3:
        return float(min(2 * left - 1, num_microbatches))
    if code == 4:
        return float(min(num_ranks, 2 * left - 1, num_microbatches))
    return 1.0
