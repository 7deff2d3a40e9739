"""Partitions by single-layer moves: each step tries the moves a critical path and the full ranks call for.

A layer on stage s costs, in the step, the coefficients of the critical path times its seconds, and on a rank that
recomputes, the recomputation that its bytes force:

    price_s = sum_k n[s, k] / n[s] * (cF f_k + cI i_k + cW w_k + slope_r * (state_k + live_s kept_k))

with slope_r the weighted seconds a byte of rank r costs at the margin. Moves from dear to cheap stages are tried in order
of the difference of prices, stages between them shift; the first better one is taken. Better means a shorter step with a
tie-break (`crowding`), because steps are maxima and often stay. A local optimum of these moves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.completion_tables import CompletionTables, crowding, evaluate, scratch_of
from stagewright.planner.search.order import trace_back

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

_CROWDING = 0.02  # weight of the tie-break
_PARTNERS = 8  # dearest and cheapest stages that are paired


@njit(cache=True)
def descend(
    tables: CompletionTables, start: Longs, tries: int, most_steps: int, give_up_s: float
) -> tuple[float, Longs, Longs, int]:
    """Return the step, bounds and counts [S, K, 3] that single-layer moves from `start` reach, and the evaluations.

    The step is infinite when no recomputation was found with which the first partition fits, and moves are not tried when
    its step is beyond `give_up_s`.
    """
    stages, runs = len(start) - 1, len(tables.forward_s)
    scratch = scratch_of(tables)
    bounds, trial = start.copy(), start.copy()
    counts = np.zeros((stages, runs, 3), dtype=np.int64)
    trial_counts = np.zeros((stages, runs, 3), dtype=np.int64)
    weight: Floats = np.ones(stages)
    value: float = evaluate(tables, bounds, weight, counts, scratch)
    made = 1
    if not np.isfinite(value) or value > give_up_s:
        return value, bounds, counts, made
    goal = value * (1.0 + _CROWDING * crowding(tables, scratch, value))
    path = np.zeros(3 * stages + len(tables.hop_latency_s) + 1, dtype=np.int32)
    stale = False
    for _ in range(most_steps):
        if stale:
            evaluate(tables, bounds, weight, counts, scratch)
            made += 1
        path[:] = 0
        trace_back(
            tables.before,
            tables.across,
            tables.hop,
            tables.code,
            tables.last,
            scratch.hop_s,
            scratch.tail_s,
            scratch.end,
            stages,
            path,
        )
        weights = path[stages : 2 * stages]
        weight[:] = weights + 0.05 * max(1.0, float(weights.max()))
        give, take = _prices(tables, bounds, counts, path, weight)
        found = False
        for giver, taker in _moves(tables, bounds, give, take, tries):
            trial[:] = bounds
            if giver < taker:
                trial[giver + 1 : taker + 1] -= 1
            else:
                trial[taker + 1 : giver + 1] += 1
            made += 1
            stale = True
            new: float = evaluate(tables, trial, weight, trial_counts, scratch)
            if not np.isfinite(new):
                continue
            new_goal = new * (1.0 + _CROWDING * crowding(tables, scratch, new))
            if new_goal < goal * (1.0 - 1e-9):
                value, goal = new, new_goal
                bounds, trial = trial, bounds
                counts, trial_counts = trial_counts, counts
                found, stale = True, False
                break
        if not found:
            break
    return value, bounds, counts, made


@njit(cache=True)
def _moves(tables: CompletionTables, bounds: Longs, give: Floats, take: Floats, tries: int) -> list[tuple[int, int]]:
    """Return (giver, taker): the `tries` dearest moves that promise anything, then those between chunks of one rank.

    Between chunks of a rank the work stays and the live bytes change.
    """
    givers, takers = np.argsort(-give)[:_PARTNERS], np.argsort(take)[:_PARTNERS]
    gain = np.empty(len(givers) * len(takers))
    for first in range(len(givers)):
        for second in range(len(takers)):
            gain[first * len(takers) + second] = give[givers[first]] - take[takers[second]]
    moves = []
    for place in np.argsort(-gain)[:tries]:
        giver, taker = int(givers[place // len(takers)]), int(takers[place % len(takers)])
        if gain[place] > 0.0 and giver != taker and bounds[giver + 1] - bounds[giver] > 1:
            moves.append((giver, taker))
    if tries > 0:
        for rank in range(len(tables.slot_stage)):
            for giver in tables.slot_stage[rank]:
                for taker in tables.slot_stage[rank]:
                    if giver >= 0 and taker >= 0 and giver != taker and bounds[giver + 1] - bounds[giver] > 1:
                        moves.append((int(giver), int(taker)))
    return moves


@njit(cache=True)
def _prices(
    tables: CompletionTables, bounds: Longs, counts: Longs, path: npt.NDArray[np.int32], weight: Floats
) -> tuple[Floats, Floats]:
    """Return what a layer less saves and a layer more costs on each stage, [S], [S]."""
    stages, runs = counts.shape[0], counts.shape[1]
    give, take = np.zeros(stages), np.zeros(stages)
    lowest = 0
    while not tables.levels[lowest]:
        lowest += 1
    mean_kept, mean_late, mean_state = np.zeros(stages), np.zeros(stages), np.zeros(stages)
    for stage in range(stages):
        total = max(bounds[stage + 1] - bounds[stage], 1)
        for run in range(runs):
            share = _number_on(tables, bounds, stage, run) / total
            seconds = path[stage] * tables.forward_s[run] + path[stages + stage] * tables.input_grad_s[run]
            seconds += path[2 * stages + stage] * tables.weight_grad_s[run]
            give[stage] += share * seconds
            mean_kept[stage] += share * tables.kept_bytes[lowest, run]
            mean_late[stage] += share * tables.late_bytes[lowest, run]
            mean_state[stage] += share * tables.state_bytes[run]
        take[stage] = give[stage]
    for rank in range(len(tables.slot_stage)):
        slope = np.inf
        for place in range(tables.slot_stage.shape[1]):
            stage = tables.slot_stage[rank, place]
            if stage < 0:
                continue
            before, behind = tables.live[rank, :, 0, place].max(), tables.live[rank, :, 1, place].max()
            for run in range(runs):
                for high in range(lowest + 1, 3):
                    if counts[stage, run, high] > 0:
                        saved = before * (tables.kept_bytes[lowest, run] - tables.kept_bytes[high, run])
                        saved += behind * (tables.late_bytes[lowest, run] - tables.late_bytes[high, run])
                        price = tables.recompute_s[high, run] - tables.recompute_s[lowest, run]
                        if saved > 0.0:
                            slope = min(slope, weight[stage] * price / saved)
        if not np.isfinite(slope):
            continue
        for place in range(tables.slot_stage.shape[1]):
            stage = tables.slot_stage[rank, place]
            if stage < 0:
                continue
            before, behind = tables.live[rank, :, 0, place].max(), tables.live[rank, :, 1, place].max()
            held = slope * (mean_state[stage] + before * mean_kept[stage] + behind * mean_late[stage])
            give[stage] += held
            take[stage] += held
    return give, take


@njit(cache=True)
def _number_on(tables: CompletionTables, bounds: Longs, stage: int, run: int) -> float:
    """Return how many layers of a run stand on a stage."""
    low = max(bounds[stage], tables.run_start[run])
    high = min(bounds[stage + 1], tables.run_start[run + 1])
    return float(max(high - low, 0))
