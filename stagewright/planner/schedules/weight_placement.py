"""Placing weight gradients by cost: given each rank's order of F and I, where do the W go?

A W may run any time after its I, needs nothing else and gives back the activation, so it fills idle time. The rank goes
through its F and I in order; before the next of them, the oldest waiting W runs when

- that action is a forward and would pass the memory cap, or
- the action would start no sooner than the W's end less a tolerance: 0 for a W that fits the gap, W itself for
  "always first", or
- more W wait than the rank is to keep, as in the papers' drawings, where a W follows each I after the first few.

Left-over W run at the end. Which of these is best depends on the costs, so `place_by_cost` tries the drawings' order and
a grid of tolerances, including "only when memory forces", keeps the best and improves it with `descent` moves of W
alone. A fixed order for unit costs misses 20 of the 150 published rows.

The rule never deadlocks where the F and I alone do not deadlock under the cap with every W right after its I. O(N D)
for N actions and one tolerance. Paper: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024 (the greedy filling).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
from numba import njit

from stagewright.planner.schedules.descent import Goal, descend
from stagewright.planner.schedules.list_scheduling import (
    BACKWARD,
    EPSILON,
    FORWARD,
    WEIGHT,
    Chains,
    Floats,
    Ints,
    Words,
    end_tables,
    ideal_s,
    measure,
    word_offsets,
)
from stagewright.planner.schedules.orders import alternate

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # tolerances tried, in W of the rank
_PLACEMENT_COST = 8.0  # a placement takes the time of as many sweeps over its actions
_ALWAYS = 2  # policies tried whatever the budget
_NEVER = -np.inf  # tolerance of "only when memory forces"


def place_by_cost(
    chains: Chains, skeletons: Iterable[Words], cap: Floats, goal: Goal, *, budget: float, seed: int = 1
) -> Words | None:
    """Return the best words found by placing W into the given orders of F and I; None when all pass the cap.

    `budget` is the number of timed actions to spend; two placements of each order are always made.
    """
    best: Words | None = None
    best_s, spent = np.inf, 0.0
    makespan_bound_s, span_bound_s = ideal_s(chains)
    least_s = goal.makespan_weight * makespan_bound_s + goal.span_weight * span_bound_s
    for skeleton in skeletons:
        for index, (tolerance_s, most_waiting) in enumerate(_policies(chains, skeleton, cap)):
            if index >= _ALWAYS and spent > 0.5 * budget:
                break
            words: Words = place_weight_gradients(chains, skeleton, cap, *tolerance_s, most_waiting)
            measured = measure(chains, words)
            value_s = goal.value_s(measured)
            spent += _PLACEMENT_COST * len(words.letters)
            if value_s < best_s - chains.slack_s:
                best, best_s = words, value_s
            if goal.main_s(measured) <= least_s + chains.slack_s:
                return words
    if best is None:
        return None
    moves = int((budget - spent) / max(len(best.letters), 1))
    return descend(chains, best, cap, goal, moves=moves, seed=seed, only_weights=True) if moves > 0 else best


def alternating_skeleton(forwards: Ints, backwards: Ints, warmups: Ints, num_positions: int) -> Words:
    """Return F and I in turn after each rank's warm-up; positions by rank and unit, [D, n] each, warm-ups [D]."""
    words = [
        alternate(FORWARD * num_positions + forward, BACKWARD * num_positions + backward, int(warmup))
        for forward, backward, warmup in zip(forwards, backwards, warmups, strict=True)
    ]
    return Words(np.concatenate(words), np.arange(len(words) + 1, dtype=np.int64) * len(words[0]))


def _policies(chains: Chains, skeleton: Words, cap: Floats) -> list[tuple[tuple[float, float], Ints]]:
    """Return (tolerances, most waiting W of each rank) to try, the best guess first."""
    weight_s = float(chains.seconds[WEIGHT].mean())
    any_number = np.full(len(cap), np.iinfo(np.int64).max)
    in_turn = _room_for_weights(chains, skeleton, cap)
    pairs = [(forward * weight_s, backward * weight_s) for backward in _SHARES for forward in _SHARES]
    forced = [(_NEVER, share * weight_s) for share in _SHARES]
    return [
        (pairs[0], any_number),
        ((_NEVER, _NEVER), in_turn),
        *((tolerance_s, any_number) for tolerance_s in [(_NEVER, _NEVER), *pairs[1:], *forced]),
    ]


def _room_for_weights(chains: Chains, skeleton: Words, cap: Floats) -> Ints:
    """Return how many activations each rank may keep for W beside its most in flight between F and I."""
    kind, position = np.divmod(skeleton.letters, len(chains.rank))
    change = np.where(kind == FORWARD, 1.0, -1.0) * chains.held[position]
    room = []
    for rank, (low, high) in enumerate(itertools.pairwise(skeleton.offset)):
        flight = np.cumsum(change[low:high]).max(initial=0.0)
        largest = chains.held[chains.rank == rank].max(initial=0.0)
        room.append(int((cap[rank] - flight + EPSILON) // max(largest, EPSILON)))
    return np.array(room, dtype=np.int64)


@njit(cache=True)
def place_weight_gradients(
    chains: Chains,
    skeleton: Words,
    cap: Floats,
    forward_tolerance_s: float,
    backward_tolerance_s: float,
    most_waiting: Ints,
) -> Words:
    """Return the skeleton's F and I with the W between them; words are cut short on a deadlock.

    A W may delay the next forward or backward by the given seconds, -inf for "never before"; a rank that has more than
    `most_waiting` W runs one at once.
    """
    # Fields are local: a call that takes a tuple of arrays counts references for each of them.
    rank_of, is_entry, is_exit, seconds = chains.rank, chains.is_entry, chains.is_exit, chains.seconds
    latency_s, held, slack_s, taken_end = chains.latency_s, chains.held, chains.slack_s, skeleton.offset[1:]
    positions, num_ranks = len(rank_of), len(cap)
    offset = word_offsets(chains)
    letters, given = np.empty(offset[num_ranks], dtype=np.int32), skeleton.letters
    queue = np.empty(len(given), dtype=np.int32)
    head, tail, taken = skeleton.offset[:-1].copy(), skeleton.offset[:-1].copy(), skeleton.offset[:-1].copy()
    at = offset[:-1].copy()
    forward_end_s, backward_end_s = end_tables(chains)
    done = np.zeros((3, positions), dtype=np.int64)
    free_s, live = np.zeros(num_ranks), np.zeros(num_ranks)
    choice, start_s = np.full(num_ranks, -1), np.full(num_ranks, np.inf)
    is_stale = np.ones(num_ranks, dtype=np.bool_)
    for _ in range(offset[num_ranks]):
        rank = -1
        for other in range(num_ranks):
            if is_stale[other]:
                is_stale[other] = False
                choice[other], start_s[other] = -1, np.inf
                arrival_s, tolerance_s, is_full, letter = np.inf, backward_tolerance_s, False, -1
                is_last = taken[other] == taken_end[other]
                if not is_last:
                    letter = given[taken[other]]
                    kind = letter // positions
                    position = letter - kind * positions
                    unit = done[kind, position]
                    if kind == FORWARD:
                        tolerance_s = forward_tolerance_s
                        is_full = live[other] + held[position] > cap[other] + EPSILON
                        if is_entry[position]:
                            arrival_s = 0.0
                        elif done[FORWARD, position - 1] > unit:
                            arrival_s = forward_end_s[position - 1, unit]
                            if rank_of[position - 1] != other:
                                arrival_s += latency_s
                    elif done[FORWARD, position] > unit and (is_exit[position] or done[BACKWARD, position + 1] > unit):
                        arrival_s = forward_end_s[position, unit]
                        if not is_exit[position]:
                            hop_s = latency_s if rank_of[position + 1] != other else 0.0
                            arrival_s = max(arrival_s, backward_end_s[position + 1, unit] + hop_s)
                if is_full:
                    arrival_s = np.inf
                arrival_s = max(arrival_s, free_s[other])
                runs_weight = False
                if head[other] < tail[other]:
                    gap_s = arrival_s + tolerance_s - free_s[other] if tolerance_s > -np.inf else -np.inf
                    fits = gap_s >= seconds[WEIGHT, queue[head[other]]] - slack_s
                    is_crowded = tail[other] - head[other] > most_waiting[other]
                    runs_weight = is_full or is_last or is_crowded or fits
                if runs_weight:
                    choice[other], start_s[other] = WEIGHT * positions + queue[head[other]], free_s[other]
                elif arrival_s < np.inf:
                    choice[other], start_s[other] = letter, arrival_s
            if choice[other] >= 0 and (rank < 0 or start_s[other] < start_s[rank] - slack_s):
                rank = other
        if rank < 0:
            return Words(letters[:0].copy(), np.zeros(num_ranks + 1, dtype=np.int64))
        letter = choice[rank]
        kind = letter // positions
        position = letter - kind * positions
        letters[at[rank]] = letter
        at[rank] += 1
        end_s = start_s[rank] + seconds[kind, position]
        free_s[rank] = end_s
        is_stale[rank] = True
        if kind == WEIGHT:
            head[rank] += 1
            live[rank] -= held[position]
        elif kind == FORWARD:
            taken[rank] += 1
            live[rank] += held[position]
            forward_end_s[position, done[kind, position]] = end_s
            if not is_exit[position]:
                is_stale[rank_of[position + 1]] = True
        else:
            taken[rank] += 1
            queue[tail[rank]] = position
            tail[rank] += 1
            backward_end_s[position, done[kind, position]] = end_s
            if not is_entry[position]:
                is_stale[rank_of[position - 1]] = True
        done[kind, position] += 1
    return Words(letters, offset)
