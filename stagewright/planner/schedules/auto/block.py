"""Repeating blocks: one microbatch's pattern, repeated with a period, packed without overlap on every rank.

Parameters are a slack of at least 0 for each of the 3 S letters and a stretch f >= 1; the period is P = f * busiest rank's
work on one microbatch. F_0 .. F_{S-1}, I_{S-1} .. I_0 and then the W's are placed in this order, each at the earliest time that
is at least ready + slack and free, modulo P, on its rank. Microbatch k runs the block k P later, so copies never overlap.
In the steady state a rank holds, at time t,

    sum over chunks of  a * (floor((t - F) / P) - share * floor((t - I_end) / P) - (1 - share) * floor((t - W_end) / P))

and the peak is met at the start of an F. Warm-up and cool-down hold subsets of it, so the unrolled order keeps the caps,
and it cannot deadlock because it comes from real times. Sweeping the order shifts it left, which removes most of what
f > 1 added; f > 1 matters, since an exact tiling at f = 1 rarely exists when F, I and W differ.

The search is random hill climbing with restarts (after Qi et al., "Pipeline Parallelism with Controllable Memory", 2024,
whose V-Min, V-Half and V-ZB blocks are points of this space). A block over its caps costs its excess and is rejected before it is unrolled.
O(S * v) for a block, O(actions * v) for its order. No optimality.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from stagewright.planner.schedules.auto.decoder import empty_words, stages_by_rank
from stagewright.planner.schedules.auto.draw import State, below, normal, seeded, uniform
from stagewright.planner.schedules.auto.instance import Floats, Instance, Ints, Tables
from stagewright.planner.schedules.auto.sweep import sweep

INFEASIBLE_S = 1e9  # cost of a block over its cap, before its excess
RESTART_AFTER = 4000  # blocks without a better one
SCAN = 64  # blocks without slack, of growing stretch, that the first climb starts from
SCAN_STEP = 0.02
LETTERS_PER_MOVE = 25  # letters placed in the time of an annealing move
ACTIONS_PER_MOVE = 80  # actions of an order written and timed in the time of an annealing move


def search_blocks(instance: Instance, *, moves: int, seed: int) -> tuple[float, Ints]:
    """Return the best makespan and words among the blocks that cost as much as `moves` annealing moves.

    The makespan is infinite when no block keeps the caps.
    """
    words = empty_words(instance)
    best = climb_blocks(
        instance.tables,
        instance.costs.activation,
        instance.costs.freed_at_input_grad,
        stages_by_rank(instance),
        moves,
        seeded(seed),
        words,
    )
    return (float(best), words) if best < INFEASIBLE_S else (np.inf, words)


@njit(cache=True)
def climb_blocks(
    tables: Tables, activation: Floats, freed: Floats, stages: Ints, moves: int, state: State, best_words: Ints
) -> float:
    """Return the best value; `best_words` is overwritten with its order when it keeps the caps."""
    num_letters = len(tables.rank)
    work_s = np.zeros(len(tables.lengths))
    for letter in range(num_letters):
        work_s[tables.rank[letter]] += tables.duration_s[letter]
    busiest_s = work_s.max()
    mean_s = tables.duration_s.mean()
    words = best_words.copy()
    start_s = np.empty(num_letters)
    end_s = np.empty(num_letters * tables.num_microbatches)
    best = np.inf
    current = np.inf
    slack = np.zeros(num_letters)
    trial = slack.copy()
    stretch = 1.0
    since_better = 0
    placing_cost = 1 + num_letters // LETTERS_PER_MOVE
    timing_cost = num_letters * tables.num_microbatches // ACTIONS_PER_MOVE
    spent, block = 0, -1
    while spent < moves:
        block += 1
        spent += placing_cost
        if since_better >= RESTART_AFTER:
            since_better = 0
            current = np.inf
            density = uniform(state) * 0.5
            for letter in range(num_letters):
                slack[letter] = _draw_slack(mean_s, density, state)
            stretch = 1.0 + 1.2 * uniform(state) ** 2
        trial[:] = slack
        trial_stretch = stretch
        if block < SCAN:
            trial_stretch = 1.0 + SCAN_STEP * block
        elif current < np.inf:
            for _ in range(1 + below(state, 3)):
                trial[below(state, num_letters)] = _draw_slack(mean_s, 0.6, state)
            if uniform(state) < 0.3:
                trial_stretch = max(1.0, stretch * (1.0 + 0.1 * normal(state)))
            elif uniform(state) < 0.1:
                trial_stretch = 1.0
        period_s = busiest_s * trial_stretch
        value = np.inf
        if _place(tables, stages, trial, period_s, start_s):
            excess = _excess(tables, activation, freed, stages, period_s, start_s)
            if excess > 0.0:
                value = INFEASIBLE_S * (1.0 + excess) + _lifetime(tables, start_s)
            else:
                spent += timing_cost
                _unroll(tables, stages, period_s, start_s, words)
                value = sweep(tables, words, end_s)
        since_better += 1
        if value <= current and value < np.inf:
            if value < current:
                since_better = 0
            current = value
            slack[:] = trial
            stretch = trial_stretch
            if value < best:
                best = value
                if value < INFEASIBLE_S:
                    best_words[:] = words
    return best


@njit(cache=True, no_cpython_wrapper=True)
def _draw_slack(mean_s: float, density: float, state: State) -> float:
    if uniform(state) >= density:
        return 0.0
    return float(3.0 * mean_s * uniform(state) ** 2 if uniform(state) < 0.8 else 10.0 * mean_s * uniform(state))


@njit(cache=True, no_cpython_wrapper=True)
def _place(tables: Tables, stages: Ints, slack_s: Floats, period_s: float, start_s: Floats) -> bool:
    """Return whether every letter found a place; `start_s` [num_letters] is overwritten."""
    num_letters = len(tables.rank)
    num_stages = num_letters // 3
    tiny = 1e-9 * period_s
    start_s[:] = -1.0
    for index in range(num_letters):
        if index < num_stages:
            letter = 3 * index
        elif index < 2 * num_stages:
            letter = 3 * (2 * num_stages - 1 - index) + 1
        else:
            letter = 3 * (3 * num_stages - 1 - index) + 2
        before = tables.predecessor[letter]
        time = slack_s[letter]
        if before >= 0:
            time += start_s[before] + tables.duration_s[before] + tables.delay_s[letter]
        length_s = tables.duration_s[letter]
        limit_s = time + period_s
        moved = True
        while moved:
            moved = False
            for stage in stages[tables.rank[letter]]:
                if stage < 0:
                    continue
                for kind in range(3):
                    other = 3 * stage + kind
                    if start_s[other] < 0.0:
                        continue
                    # Phase of this start after the other's start, in [0, P).
                    phase = (time - start_s[other]) % period_s
                    if phase > period_s - tiny:
                        phase = 0.0
                    if phase < tables.duration_s[other] - tiny:
                        time += tables.duration_s[other] - phase
                        moved = True
                    elif phase + length_s > period_s + tiny:
                        time += period_s - phase + tables.duration_s[other]
                        moved = True
            if time > limit_s:
                return False
        start_s[letter] = time
    return True


@njit(cache=True, no_cpython_wrapper=True)
def _excess(tables: Tables, activation: Floats, freed: Floats, stages: Ints, period_s: float, start_s: Floats) -> float:
    """Return by how much the steady state's peak is over the caps, summed over ranks, in shares of a cap."""
    total = 0.0
    tiny = 1e-6
    for rank in range(len(tables.lengths)):
        if tables.cap[rank] == np.inf:
            continue
        peak = 0.0
        for at in stages[rank]:
            if at < 0:
                continue
            time = start_s[3 * at]
            live = 0.0
            for stage in stages[rank]:
                if stage < 0:
                    continue
                letter = 3 * stage
                entered = np.floor((time - start_s[letter]) / period_s + tiny) + 1.0
                half = np.floor((time - start_s[letter + 1] - tables.duration_s[letter + 1]) / period_s + tiny) + 1.0
                gone = np.floor((time - start_s[letter + 2] - tables.duration_s[letter + 2]) / period_s + tiny) + 1.0
                live += activation[stage] * (entered - freed[stage] * half - (1.0 - freed[stage]) * gone)
            peak = max(peak, live)
        if peak > tables.cap[rank]:
            total += (peak - tables.cap[rank]) / tables.cap[rank]
    return total


@njit(cache=True, no_cpython_wrapper=True)
def _lifetime(tables: Tables, start_s: Floats) -> float:
    total = 0.0
    for letter in range(0, len(start_s), 3):
        total += start_s[letter + 2] + tables.duration_s[letter + 2] - start_s[letter]
    return total


@njit(cache=True, no_cpython_wrapper=True)
def _unroll(tables: Tables, stages: Ints, period_s: float, start_s: Floats, words: Ints) -> None:
    """Write the order of all microbatches: a rank's letters by phase, one period after the other."""
    microbatches = tables.num_microbatches
    num_chunks = stages.shape[1]
    letters = np.empty(3 * num_chunks, dtype=np.int32)
    phases = np.empty(3 * num_chunks)
    for rank in range(len(tables.lengths)):
        count = 0
        last_turn = 0
        for stage in stages[rank]:
            if stage < 0:
                continue
            for kind in range(3):
                letters[count] = 3 * stage + kind
                phases[count] = start_s[3 * stage + kind] % period_s
                last_turn = max(last_turn, int(start_s[3 * stage + kind] // period_s))
                count += 1
        by_phase = np.argsort(phases[:count], kind="mergesort")
        at = 0
        for turn in range(last_turn + microbatches):
            for index in by_phase:
                letter = letters[index]
                microbatch = turn - int(start_s[letter] // period_s)
                if 0 <= microbatch < microbatches:
                    words[rank, at] = letter * microbatches + microbatch
                    at += 1
