"""The least recomputation that makes layers fit: a multiple-choice knapsack, solved exactly.

    min   sum_l rho_l(k_l)
    s.t.  sum_l w_{v,l}(k_l) + max_l u_l(k_l) <= budget_v        for each live vector v

with rho the seconds, w the bytes that all live microbatches keep and u the workspace of layer l at level k_l. Layers of
one class are alike, so counts decide. The maximum is handled by trying every workspace ceiling; under a ceiling, classes
are added one by one to the list of choices that no other choice beats in seconds and all bytes (Nemhauser and Ullmann,
1969). Worst case exponential in the number of classes, in practice a few hundred entries; `limit` caps the list, after
which the result is an upper bound and `exact` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """`count` equal layers and what each level of one of them costs.

    Parameters
    ----------
    seconds : [K], added to the backward.
    kept_bytes : [V, K], bytes that the live microbatches keep, for each live vector.
    workspace_bytes : [K].
    """

    count: int
    seconds: Floats
    kept_bytes: Floats
    workspace_bytes: Floats


@dataclass(frozen=True)
class Recomputation:
    """Seconds added to the backward, and for each group how many layers take each level."""

    seconds: float
    counts: tuple[tuple[int, ...], ...]
    exact: bool = True


@dataclass(frozen=True, eq=False)
class _Choices:
    seconds: Floats
    kept: Floats  # [n, V]
    counts: list[tuple[tuple[int, ...], ...]]


def least_recompute(groups: Sequence[LayerGroup], budget: Floats, *, limit: int = 20_000) -> Recomputation | None:
    """Return the cheapest levels with which the layers fit; None when no levels do."""
    ceilings = sorted({float(value) for group in groups for value in group.workspace_bytes})
    best: Recomputation | None = None
    if not groups:
        return Recomputation(0.0, ()) if (budget >= 0).all() else None
    for ceiling in ceilings:
        found = _under_ceiling(groups, budget - ceiling, ceiling, limit)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
        if best is not None and best.seconds == 0.0:
            break
    return best


def _under_ceiling(groups: Sequence[LayerGroup], budget: Floats, ceiling: float, limit: int) -> Recomputation | None:
    if (budget < 0).any():
        return None
    rest = np.zeros((len(groups) + 1, len(budget)))
    for index in range(len(groups) - 1, -1, -1):
        allowed = groups[index].workspace_bytes <= ceiling
        if not allowed.any():
            return None
        rest[index] = rest[index + 1] + groups[index].count * groups[index].kept_bytes[:, allowed].min(axis=1)
    state = _Choices(np.zeros(1), np.zeros((1, len(budget))), [()])
    exact = True
    for index, group in enumerate(groups):
        options = _group_choices(group, ceiling)
        seconds = (state.seconds[:, None] + options.seconds[None, :]).ravel()
        kept = (state.kept[:, None, :] + options.kept[None, :, :]).reshape(-1, len(budget))
        fits = np.flatnonzero((kept + rest[index + 1] <= budget).all(axis=1))
        if not len(fits):
            return None
        chosen = fits[_minimal(seconds[fits], kept[fits])]
        if len(chosen) > limit:
            chosen, exact = chosen[:limit], False
        width = len(options.seconds)
        state = _Choices(
            seconds[chosen],
            kept[chosen],
            [state.counts[row // width] + options.counts[row % width] for row in chosen.tolist()],
        )
    best = int(np.argmin(state.seconds))
    return Recomputation(float(state.seconds[best]), state.counts[best], exact)


def _group_choices(group: LayerGroup, ceiling: float) -> _Choices:
    levels = [level for level in range(len(group.seconds)) if group.workspace_bytes[level] <= ceiling]
    counts = np.array([list(part) for part in _compositions(group.count, len(levels))], dtype=np.int64)
    seconds = counts @ group.seconds[levels]
    kept = counts @ group.kept_bytes[:, levels].T
    chosen = _minimal(seconds, kept)
    named: list[tuple[tuple[int, ...], ...]] = []
    for row in chosen.tolist():
        full = [0] * len(group.seconds)
        for level, count in zip(levels, counts[row].tolist(), strict=True):
            full[level] = count
        named.append((tuple(full),))
    return _Choices(seconds[chosen], kept[chosen], named)


def _compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """Return all ways to write `total` as an ordered sum of `parts` counts."""
    if parts == 1:
        return [(total,)]
    if parts == 2:
        return [(first, total - first) for first in range(total, -1, -1)]
    heads = product(range(total, -1, -1), repeat=parts - 1)
    return [(*head, total - sum(head)) for head in heads if sum(head) <= total]


def _minimal(seconds: Floats, kept: Floats) -> npt.NDArray[np.int64]:
    """Return the rows that no other row beats, in order of seconds."""
    order = np.lexsort((kept.sum(axis=1), seconds))
    if kept.shape[1] == 1:
        lowest = np.minimum.accumulate(kept[order, 0])
        keep = np.concatenate(([True], kept[order[1:], 0] < lowest[:-1]))
        return np.asarray(order[keep])
    chosen: list[int] = []
    for row in order.tolist():
        if not chosen or not (kept[chosen] <= kept[row]).all(axis=1).any():
            chosen.append(row)
    return np.array(chosen, dtype=np.int64)
