"""How long the slices of a sequence should be (TeraPipe's dynamic programme, Seq1F1B's equal work).

A slice of `length` units after a `prefix` of units takes t(length, prefix), more the later it comes, because attention
looks back. TeraPipe minimises the latency of a pipeline of D stages,

    min over slicings of  sum_i t_i + (D - 1) max_i t_i.

For a bound t_max on the slices, S(i) = min over k <= i of S(i - k) + t(k, i - k) with t <= t_max is O(L^2); every value of
t that occurs is tried as t_max, ascending, and the search stops when (D - 1) t_max + S alone cannot win: exact.
Seq1F1B cuts so that every slice has the same work.

SlimPipe keeps uniform slices and lets ranks that work on late slices hand attention to ranks that work on early ones, so
that all ranks take equally long at any moment (context exchange).

Papers: Li et al., TeraPipe, ICML 2021; Sun et al., Seq1F1B, NAACL 2025; Li et al., SlimPipe, 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument

Floats = npt.NDArray[np.float64]


def fastest_slices(num_units: int, num_stages: int, seconds: Callable[[int, int], float]) -> tuple[int, ...]:
    """Return the lengths, in units, that minimise sum + (D - 1) max; `seconds(length, prefix)` is t."""
    if num_units < 1 or num_stages < 1:
        raise InvalidArgument(f"{num_units} units on {num_stages} stages: both are at least 1", field="num_units")
    table = np.full((num_units + 1, num_units + 1), np.inf)
    for end in range(1, num_units + 1):
        for length in range(1, end + 1):
            table[length, end] = seconds(length, end - length)
    least = _shortest(table, np.inf)[0]
    best = np.inf
    lengths: tuple[int, ...] = ()
    for bound in np.unique(table[np.isfinite(table)]).tolist():
        if least + (num_stages - 1) * bound >= best:
            break
        total, found = _shortest(table, bound)
        if found and total + (num_stages - 1) * bound < best:
            best, lengths = total + (num_stages - 1) * bound, found
    return lengths


def _shortest(table: Floats, bound: float) -> tuple[float, tuple[int, ...]]:
    """Return the least sum of slices no longer than `bound` seconds and their lengths; empty when there is none."""
    count = len(table) - 1
    least = np.full(count + 1, np.inf)
    chosen = np.zeros(count + 1, dtype=np.int64)
    least[0] = 0.0
    for end in range(1, count + 1):
        for length in range(1, end + 1):
            if table[length, end] <= bound and least[end - length] + table[length, end] < least[end]:
                least[end] = least[end - length] + table[length, end]
                chosen[end] = length
    if not np.isfinite(least[count]):
        return np.inf, ()
    lengths: list[int] = []
    end = count
    while end:
        lengths.append(int(chosen[end]))
        end -= lengths[-1]
    return float(least[count]), tuple(reversed(lengths))


def equal_work_slices(num_tokens: int, num_slices: int, linear: float, quadratic: float) -> tuple[int, ...]:
    """Return K lengths in tokens whose work linear * n + quadratic * (pairs attended to) is equal up to rounding.

    The work of the first x tokens is linear x + quadratic x^2 / 2; the cuts are its K-quantiles, so lengths decrease.
    """
    if not 1 <= num_slices <= num_tokens:
        raise InvalidArgument(f"{num_tokens} tokens cannot become {num_slices} slices", field="num_slices")
    if linear < 0 or quadratic < 0 or linear + quadratic <= 0:
        raise InvalidArgument(f"work of {linear} a token and {quadratic} a pair must be positive", field="linear")
    total = linear * num_tokens + quadratic * num_tokens**2 / 2
    share = total * np.arange(1, num_slices) / num_slices
    root = np.sqrt(linear**2 + 2 * quadratic * share)
    cuts = (root - linear) / quadratic if quadratic else share / linear
    edges = np.concatenate([[0], np.rint(cuts).astype(np.int64), [num_tokens]])
    edges = np.maximum.accumulate(np.maximum(edges, np.arange(num_slices + 1)))
    edges = np.minimum(edges, num_tokens - np.arange(num_slices, -1, -1))
    return tuple(int(length) for length in np.diff(edges))


def context_exchange(work_s: Sequence[float]) -> tuple[tuple[int, int, float], ...]:
    """Return (from, to, seconds) of attention handed over so that ranks with `work_s` at hand all take the mean.

    The total handed over is the least that does it, the sum of what is above the mean; there are fewer transfers than ranks.
    """
    values = np.asarray(work_s, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all() or (values < 0.0).any():
        raise InvalidArgument(f"work_s is {values.tolist()}, each must be finite and at least 0", field="work_s")
    slack = 1e-12 * float(values.sum())
    over = values - values.mean()
    givers = [rank for rank in np.argsort(-over, kind="stable").tolist() if over[rank] > slack]
    takers = [rank for rank in np.argsort(over, kind="stable").tolist() if over[rank] < -slack]
    moves: list[tuple[int, int, float]] = []
    while givers and takers:
        giver, taker = givers[0], takers[0]
        amount = float(min(over[giver], -over[taker]))
        moves.append((giver, taker, amount))
        over[giver] -= amount
        over[taker] += amount
        if over[giver] <= slack:
            givers.pop(0)
        if over[taker] >= -slack:
            takers.pop(0)
    return tuple(moves)
