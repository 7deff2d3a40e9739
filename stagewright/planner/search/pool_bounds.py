"""Bounds of pools along a pipeline, before any order is made: what layers [j, i) need at least on the ranks of a pool.

Rank r starts behind one forward of the layers before it and then works T t_r, so with f the least share of a forward in
a layer's seconds, T t_r + f sum_{q<r} t_q <= step. Weighing rank r with (1 - f/T)^(D-1-r) makes all ranks of a pool
alike: layers [j, i) on its D ranks need at least

    f / (1 - (1 - f/T)^D) sum t   behind the forward of the layers before j,

which is T/D sum t for large T, and at least T times what the rank with most layers of one class has. A chain of pools
costs at least the least maximum over cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.pricing import Priced

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

EVERY = slice(None)


@dataclass(frozen=True, eq=False)
class PoolCosts:
    """What bounds need of some choices, by class of layers, [choices, C]; `share` and `latency_s` [choices].

    Parameters
    ----------
    share : least share of the forward in a layer's seconds.
    least_bytes : states and one microbatch at the level that keeps least.
    """

    time_s: Floats
    forward_s: Floats
    share: Floats
    step_s: Floats
    least_bytes: Floats
    latency_s: Floats

    @classmethod
    def of(cls, priced: Priced, levels: list[int]) -> PoolCosts:
        """Return the costs of priced rows under the allowed recomputation levels."""
        forward, time = priced.forward_s, priced.least_time_s(levels)
        share = np.divide(forward, time, out=np.ones_like(time), where=time > 0)
        least = priced.state_bytes + priced.kept_bytes[:, levels].min(axis=1)
        return cls(time, forward, share.min(axis=1, initial=1.0), priced.step_s, least, priced.latency_s)

    def together(self) -> PoolCosts:
        """Return one row that is at most every row, none of none."""
        if not len(self.latency_s):
            return self
        return PoolCosts(*(getattr(self, name).min(axis=0, keepdims=True) for name in self.__dataclass_fields__))


def pool_needs(
    time_s: Floats,
    share: Floats,
    step_s: Floats,
    least_bytes: Floats,
    class_of: Longs,
    constant_s: Floats,
    num_microbatches: int,
    num_ranks: int,
    room_bytes: float,
    *,
    chain: bool = True,
    firsts: slice = EVERY,
    ends: slice = EVERY,
) -> Floats:
    """Return the least seconds that layers [j, i) take on `num_ranks` ranks, [choices, j, i] for some j and i of L + 1.

    Ranks that form no `chain` need not wait for each other, so theirs is T/D of the sum. `share` [choices] is the least
    share of a forward in a layer; other arrays are [choices, L]. Infinite for fewer layers than ranks, or where states
    and one microbatch never fit; an empty range is not allowed, because a pool that is there is used.
    """
    num_layers = time_s.shape[1]
    share = share if chain else np.zeros_like(share)
    left = 1.0 - share / num_microbatches
    waits = share > 1e-9
    shrink = np.where(waits, -np.expm1(num_ranks * np.log(np.maximum(left, 1e-300))), 1.0)
    weight = np.where(waits, (1.0 - left) / shrink, 1.0 / num_ranks)
    factor = weight * num_microbatches
    between = _between(factor[:, None] * time_s, firsts, ends)
    # A rank's tail counts with its own weight, at least the first rank's.
    between += _between(step_s * (weight * left ** (num_ranks - 1))[:, None], firsts, ends)
    needed = between
    if num_ranks > 1:
        for kind in np.unique(class_of):
            numbers = np.concatenate((np.zeros(1), np.cumsum(class_of == kind)))
            most = np.ceil((numbers[None, ends] - numbers[firsts, None]) / num_ranks)
            layer = int(np.flatnonzero(class_of == kind)[0])
            each = num_microbatches * time_s[:, layer] + step_s[:, layer]
            np.maximum(needed, most[None, :, :] * each[:, None, None], out=needed)
    size = np.arange(num_layers + 1)
    short = (size[None, ends] - size[firsts, None]) < num_ranks
    full = _between(least_bytes, firsts, ends) > num_ranks * room_bytes * (1 + 1e-12)
    needed += constant_s[:, None, None]
    needed[full | short[None, :, :]] = np.inf
    return needed


def _between(each: Floats, firsts: slice, ends: slice) -> Floats:
    """Return the sums over layers [j, i) of [choices, L], [choices, j, i]."""
    before = np.zeros((each.shape[0], each.shape[1] + 1))
    np.cumsum(each, axis=1, out=before[:, 1:])
    return before[:, None, ends] - before[:, firsts, None]


def best_choices(needs: Sequence[Floats]) -> list[int]:
    """Return the choice of each pool on the cut of least maximum over pools at their best."""
    best = [need.min(axis=0) for need in needs]
    before = least_before(best)
    end, chosen = -1, []
    for index in range(len(needs) - 1, -1, -1):
        first = int(np.argmin(np.maximum(before[index], best[index][:, end])))
        chosen.append(int(np.argmin(needs[index][:, first, end])))
        end = first
    return chosen[::-1]


def choice_bounds(needs: Sequence[Floats]) -> list[Floats]:
    """Return the bound of each choice of each pool beside the best of the others, [choices]."""
    best = [need.min(axis=0) for need in needs]
    before, behind = least_before(best), [np.zeros(1)]
    for need in reversed(best):
        behind.append(np.maximum(behind[-1][None, :], need).min(axis=1))
    behind.reverse()
    return [
        np.maximum(np.maximum(before[index][None, :, None], need), behind[index + 1][None, None, :]).min(axis=(1, 2))
        for index, need in enumerate(needs)
    ]


def least_before(needs: Sequence[Floats]) -> list[Floats]:
    """Return the least maximum over the first pools when they hold the layers before each place, one row a pool.

    The first pool begins with layer 0 and the last one ends with the last layer: a single row, and a single column.
    """
    found = [np.zeros(1)]
    for need in needs:
        found.append(np.maximum(found[-1][:, None], need).min(axis=0))
    return found
