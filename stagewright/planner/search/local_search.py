"""Partitions by single-layer moves: each step tries the moves a critical path and the full ranks call for.

A layer on stage s costs, in the step, the coefficients of the critical path times its seconds, and on a rank that
recomputes, the recomputation that its bytes force:

    price_s = sum_k n[s, k] / n[s] * (cF f_k + cI i_k + cW w_k + slope_r * (state_k + live_s kept_k))

with slope_r the weighted seconds a byte of rank r costs at the margin. Moves from dear to cheap stages are tried in order
of the difference of prices, stages between them shift; the first better one is taken. Better means a shorter step with a
tie-break (`crowding`), because steps are maxima and often stay. A local optimum of these moves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.completion_tables import (
    FORWARD,
    INPUT_GRAD,
    KEPT,
    LATE,
    RECOMPUTE,
    STATE,
    WEIGHT_GRAD,
    CompletionTables,
    Scratch,
    crowding,
    fullest,
    path_bound,
    prepare,
    scratch_of,
    swept,
)
from stagewright.planner.search.copying import copy_into
from stagewright.planner.search.order import trace_back

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

_CROWDING = 0.02  # weight of the tie-break
_WORSE = 5e-4
_MOST_IDLE = 200  # shakes that find nothing better
_PATHS = 64
_MOST_SHAKEN = np.int64(3)  # layers moved at once
_PARTNERS = np.int64(8)  # dearest and cheapest stages that are paired


@njit(cache=True, nogil=True)
def descend(
    tables: CompletionTables,
    start: Longs,
    tries: int,
    most_steps: int,
    give_up_s: float,
    most_moves: int,
    least_s: float,
) -> tuple[float, Longs, Longs, int]:
    """Return the step, bounds and counts [S, K, 3] that single-layer moves from `start` reach, and the sweeps made.

    The step is infinite when no recomputation was found with which the first partition fits, and moves are not tried when
    its step is beyond `give_up_s`.

    While fewer than `most_moves` moves were tried the local optimum is shaken, one to three layers moved between any two stages,
    and descended from again; the walk goes on from what is no more than _WORSE above where it was (iterated local search). It
    ends at a step below `least_s`. Paths found on the way are kept for all descents.
    """
    scratch, paths = scratch_of(tables), _no_paths(tables)
    best_s, best, best_counts, made, tried = _descend(tables, scratch, paths, start, tries, most_steps, give_up_s)
    here_s, here = best_s, best
    state = np.uint64(1)
    stages = len(start) - 1
    idle = 0
    while tried < most_moves and np.isfinite(best_s) and best_s >= least_s and idle < _MOST_IDLE:
        trial = here.copy()
        state, shakes = _random(state, _MOST_SHAKEN)
        for _ in range(shakes + 1):
            state, giver = _random(state, stages)
            state, taker = _random(state, stages)
            if giver != taker and trial[giver + 1] - trial[giver] > 1:
                _move(trial, giver, taker)
        value, bounds, counts, more, moves = _descend(tables, scratch, paths, trial, tries, most_steps, np.inf)
        made += more
        tried += 1 + moves
        idle += 1
        if value <= here_s * (1.0 + _WORSE):
            here_s, here = value, bounds
        if value < best_s:
            best_s, best, best_counts = value, bounds, counts
            idle = 0
    return best_s, best, best_counts, made


@njit(cache=True, no_cpython_wrapper=True)
def _random(state: np.uint64, below: int | np.int64) -> tuple[np.uint64, np.int64]:
    """Return the next state of a linear congruential generator (Knuth's MMIX) and an integer below `below`."""
    state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
    return state, np.int64((state >> np.uint64(33)) % np.uint64(below))


class _Paths(NamedTuple):
    """Longest paths of the partitions swept last: counts [P, 3 S + 1 + hops], rank of the end [P], how many were kept [1]."""

    counts: Ints
    ends: Longs
    kept: Longs


@njit(cache=True, no_cpython_wrapper=True)
def _no_paths(tables: CompletionTables) -> _Paths:
    width = 3 * tables.placement.shape[1] + tables.hop_lines.shape[1] + 1
    return _Paths(
        np.zeros((_PATHS, width), dtype=np.int32), np.zeros(_PATHS, dtype=np.int64), np.zeros(1, dtype=np.int64)
    )


@njit(cache=True, no_cpython_wrapper=True)
def _keep_path(tables: CompletionTables, scratch: Scratch, paths: _Paths) -> int:
    """Keep the longest path of what was swept last in place of the oldest, and return its place."""
    place = int(paths.kept[0] % len(paths.ends))
    paths.counts[place, :] = 0
    paths.ends[place] = trace_back(
        tables.before,
        tables.across,
        tables.hop,
        tables.code,
        tables.last,
        scratch.hop_s,
        scratch.tail_s,
        scratch.end,
        tables.placement.shape[1],
        paths.counts[place],
    )
    paths.kept[0] += 1
    return place


@njit(cache=True, no_cpython_wrapper=True)
def _goal(tables: CompletionTables, scratch: Scratch, step_s: float) -> float:
    return float(step_s * (1.0 + _CROWDING * crowding(tables, scratch, step_s)))


@njit(cache=True, no_cpython_wrapper=True)
def _move(bounds: Longs, giver: int, taker: int) -> None:
    """Move a layer; the stages between shift."""
    for place in range(giver + 1, taker + 1):
        bounds[place] -= 1
    for place in range(taker + 1, giver + 1):
        bounds[place] += 1


@njit(cache=True, no_cpython_wrapper=True)
def _descend(
    tables: CompletionTables,
    scratch: Scratch,
    paths: _Paths,
    start: Longs,
    tries: int,
    most_steps: int,
    give_up_s: float,
) -> tuple[float, Longs, Longs, int, int]:
    """Descend with what paths are known; those of all partitions swept are kept. The moves tried are returned last.

    A move whose known paths are too long already is not swept: a longer step's goal is larger too, the tie-break's part
    falls by less than the step grows.
    """
    stages, runs = len(start) - 1, tables.by_run.shape[1]
    bounds, trial = start.copy(), start.copy()
    counts = np.zeros((stages, runs, 3), dtype=np.int64)
    trial_counts = np.zeros((stages, runs, 3), dtype=np.int64)
    weight: Floats = np.ones(stages)
    if not prepare(tables, bounds, weight, counts, scratch):
        return np.inf, bounds, counts, 0, 0
    value: float = swept(tables, scratch)
    made, tried = 1, 0
    if value > give_up_s or most_steps == 0:
        return value, bounds, counts, made, tried
    path = paths.counts[_keep_path(tables, scratch, paths)].copy()
    goal = _goal(tables, scratch, value)
    for _ in range(most_steps):
        most = 1
        for stage in range(stages):
            most = max(most, path[stages + stage])
        for stage in range(stages):
            weight[stage] = path[stages + stage] + 0.05 * most
        give, take = _prices(
            tables.by_run, tables.by_level, tables.levels, tables.slot_stage, tables.live, counts, path, weight
        )
        found = False
        for giver, taker in _moves(tables.slot_stage, bounds, give, take, tries):
            for place in range(len(bounds)):
                trial[place] = bounds[place]
            _move(trial, giver, taker)
            tried += 1
            if not prepare(tables, trial, weight, trial_counts, scratch):
                continue
            known = min(int(paths.kept[0]), len(paths.ends))
            least_s = max(path_bound(tables, scratch, paths.counts, paths.ends, known), fullest(tables, scratch))
            if _goal(tables, scratch, least_s) >= goal * (1.0 - 1e-9):
                continue
            new: float = swept(tables, scratch)
            made += 1
            place = _keep_path(tables, scratch, paths)
            new_goal = _goal(tables, scratch, new)
            if new_goal < goal * (1.0 - 1e-9):
                value, goal = new, new_goal
                bounds, trial = trial, bounds
                counts, trial_counts = trial_counts, counts
                copy_into(path, paths.counts[place])
                found = True
                break
        if not found:
            break
    return value, bounds, counts, made, tried


@njit(cache=True, no_cpython_wrapper=True)
def _moves(slot_stage: Longs, bounds: Longs, give: Floats, take: Floats, tries: int) -> list[tuple[int, int]]:
    """Return (giver, taker): the `tries` dearest moves that promise anything, then those between chunks of one rank.

    Between chunks of a rank the work stays and the live bytes change.
    """
    givers, takers = _largest(give, 1.0, _PARTNERS), _largest(take, -1.0, _PARTNERS)
    gain = np.empty(len(givers) * len(takers))
    for first in range(len(givers)):
        for second in range(len(takers)):
            gain[first * len(takers) + second] = give[givers[first]] - take[takers[second]]
    moves = []
    for place in _largest(gain, 1.0, tries):
        giver, taker = int(givers[place // len(takers)]), int(takers[place % len(takers)])
        if gain[place] > 0.0 and giver != taker and bounds[giver + 1] - bounds[giver] > 1:
            moves.append((giver, taker))
    if tries > 0:
        for rank in range(len(slot_stage)):
            for giver in slot_stage[rank]:
                for taker in slot_stage[rank]:
                    if giver >= 0 and taker >= 0 and giver != taker and bounds[giver + 1] - bounds[giver] > 1:
                        moves.append((int(giver), int(taker)))
    return moves


@njit(cache=True, no_cpython_wrapper=True)
def _largest(values: Floats, sign: float, count: int) -> Longs:
    """Return the places of the `count` largest sign * value, the largest first; of equal ones the first."""
    count = min(count, len(values))
    chosen = np.empty(count, dtype=np.int64)
    left = np.ones(len(values), dtype=np.bool_)
    for place in range(count):
        best = -1
        for index in range(len(values)):
            if left[index] and (best < 0 or sign * values[index] > sign * values[best]):
                best = index
        chosen[place], left[best] = best, False
    return chosen


@njit(cache=True, no_cpython_wrapper=True)
def _prices(
    by_run: Floats,
    by_level: Floats,
    levels: npt.NDArray[np.bool_],
    slot_stage: Longs,
    live: Floats,
    counts: Longs,
    path: npt.NDArray[np.int32],
    weight: Floats,
) -> tuple[Floats, Floats]:
    """Return what a layer less saves and a layer more costs on each stage, [S], [S]."""
    stages, runs = counts.shape[0], counts.shape[1]
    give, take = np.zeros(stages), np.zeros(stages)
    lowest = 0
    while not levels[lowest]:
        lowest += 1
    mean_kept, mean_late, mean_state = np.zeros(stages), np.zeros(stages), np.zeros(stages)
    for stage in range(stages):
        total = max(counts[stage].sum(), 1)
        for run in range(runs):
            share = (counts[stage, run, 0] + counts[stage, run, 1] + counts[stage, run, 2]) / total
            seconds = path[stage] * by_run[FORWARD, run] + path[stages + stage] * by_run[INPUT_GRAD, run]
            seconds += path[2 * stages + stage] * by_run[WEIGHT_GRAD, run]
            give[stage] += share * seconds
            mean_kept[stage] += share * by_level[KEPT, lowest, run]
            mean_late[stage] += share * by_level[LATE, lowest, run]
            mean_state[stage] += share * by_run[STATE, run]
        take[stage] = give[stage]
    for rank in range(len(slot_stage)):
        slope = np.inf
        for place in range(slot_stage.shape[1]):
            stage = slot_stage[rank, place]
            if stage < 0:
                continue
            before, behind = live[rank, :, 0, place].max(), live[rank, :, 1, place].max()
            for run in range(runs):
                for high in range(lowest + 1, 3):
                    if counts[stage, run, high] > 0:
                        saved = before * (by_level[KEPT, lowest, run] - by_level[KEPT, high, run])
                        saved += behind * (by_level[LATE, lowest, run] - by_level[LATE, high, run])
                        price = by_level[RECOMPUTE, high, run] - by_level[RECOMPUTE, lowest, run]
                        if saved > 0.0:
                            slope = min(slope, weight[stage] * price / saved)
        if not np.isfinite(slope):
            continue
        for place in range(slot_stage.shape[1]):
            stage = slot_stage[rank, place]
            if stage < 0:
                continue
            before, behind = live[rank, :, 0, place].max(), live[rank, :, 1, place].max()
            held = slope * (mean_state[stage] + before * mean_kept[stage] + behind * mean_late[stage])
            give[stage] += held
            take[stage] += held
    return give, take
