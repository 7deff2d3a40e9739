"""Descent on words: small moves that keep an order legal and never make it worse.

A move takes an action that waits for its rank although its input is there, and puts it some places earlier, as far as
the order of its unit's F, I and W and the memory cap allow. It is kept when the goal

    makespan_weight * makespan + span_weight * longest span + 0.001 * mean end of all actions

does not grow; the last term leads across the wide plateaus of equal makespans, because an order whose actions end
earlier has room for the next move. Moves are drawn by a seeded generator, so the same input gives the same words.

One move costs one sweep over N actions (about 10 ns an action). A local minimum, not an optimum: `auto` searches longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.list_scheduling import (
    BACKWARD,
    EPSILON,
    FORWARD,
    WEIGHT,
    Chains,
    Floats,
    Measure,
    Words,
    end_tables,
    ideal_s,
    sweep,
)
from stagewright.planner.schedules.random_moves import RandomState, shift, uniform

_MEAN_END_WEIGHT = 0.001
_DRAWS_PER_MOVE = 20  # draws that meet an action that does not wait cost nothing; this bounds them
_MEAN_DISTANCE = 3.0
_LEAST_PATIENCE = 500  # moves without a gain before the descent ends early, or a quarter of its moves


@dataclass(frozen=True, slots=True)
class Goal:
    """What a generator minimises: a weighted sum of makespan and longest span."""

    makespan_weight: float = 1.0
    span_weight: float = 0.0

    def main_s(self, measured: Measure) -> float:
        """Return the weighted sum; infinite for a deadlock."""
        if not np.isfinite(measured.makespan_s):
            return float("inf")
        return self.makespan_weight * measured.makespan_s + self.span_weight * measured.longest_span_s

    def value_s(self, measured: Measure) -> float:
        """Return the weighted sum with the mean end as the tie-break."""
        return self.main_s(measured) + _MEAN_END_WEIGHT * measured.mean_end_s


def descend(
    chains: Chains, words: Words, cap: Floats, goal: Goal, *, moves: int, seed: int, only_weights: bool = False
) -> Words:
    """Return words at least as good as the given ones after `moves` timed moves."""
    makespan_s, span_s = ideal_s(chains)
    letters = words.letters.copy()
    _descend(
        chains,
        letters,
        words.offset,
        cap,
        (goal.makespan_weight, goal.span_weight),
        goal.makespan_weight * makespan_s + goal.span_weight * span_s + chains.slack_s,
        moves,
        np.array([seed], dtype=np.uint64),
        only_weights,
    )
    return Words(letters, words.offset)


@njit(cache=True)
def _descend(
    chains: Chains, letters: npt.NDArray[np.int32], offset: npt.NDArray[np.int64], cap: Floats,
    weights: tuple[float, float], enough_s: float, moves: int, state: RandomState, only_weights: bool,
) -> None:  # fmt: skip
    # Fields are local: a call that takes a tuple of arrays counts references for each of them.
    rank_of, seconds, held, slack_s = chains.rank, chains.seconds, chains.held, chains.slack_s
    positions, count = len(rank_of), len(letters)
    change = np.zeros((3, positions))
    change[FORWARD] = held
    change[WEIGHT if chains.is_split else BACKWARD] = -held / chains.fan
    forward_end_s, backward_end_s = end_tables(chains)
    done = np.zeros((3, positions), dtype=np.int64)
    start_s, ready_s, new_start_s, new_ready_s = np.empty(count), np.empty(count), np.empty(count), np.empty(count)
    live = np.empty(count)
    for rank in range(len(offset) - 1):
        total = 0.0
        for at in range(offset[rank], offset[rank + 1]):
            total += change[letters[at] // positions, letters[at] % positions]
            live[at] = total
    best = sweep(chains, letters, offset, done, forward_end_s, backward_end_s, start_s, ready_s)
    main_s = weights[0] * best.makespan_s + weights[1] * best.longest_span_s
    value_s = main_s + _MEAN_END_WEIGHT * best.mean_end_s
    made, draws, last_gain = 0, 0, 0
    patience = max(_LEAST_PATIENCE, moves // 4)
    while made < min(moves, last_gain + patience) and draws < _DRAWS_PER_MOVE * moves and main_s > enough_s:
        draws += 1
        source = int(uniform(state) * count)
        letter = letters[source]
        kind = letter // positions
        if start_s[source] <= ready_s[source] + slack_s or (only_weights and kind != WEIGHT):
            continue
        position = letter - kind * positions
        rank = rank_of[position]
        low = max(offset[rank], source - 1 - int(-_MEAN_DISTANCE * np.log(1.0 - uniform(state))))
        target = source
        while target > low:
            other = letters[target - 1]
            other_end_s = start_s[target - 1] + seconds[other // positions, other % positions]
            if other == letter or other_end_s <= ready_s[source] + slack_s:
                break  # its own unit before it, or its input is not there sooner
            if kind == FORWARD:
                before = live[target - 2] if target - 1 > offset[rank] else 0.0
                if max(live[target - 1], before) + held[position] > cap[rank] + EPSILON:
                    break
            target -= 1
        if target == source:
            continue
        shift(letters, source, target)
        made += 1
        new = sweep(chains, letters, offset, done, forward_end_s, backward_end_s, new_start_s, new_ready_s)
        new_main_s = weights[0] * new.makespan_s + weights[1] * new.longest_span_s
        new_value_s = new_main_s + _MEAN_END_WEIGHT * new.mean_end_s
        if new_value_s <= value_s + slack_s * _MEAN_END_WEIGHT:
            if new_value_s < value_s - slack_s * _MEAN_END_WEIGHT:
                last_gain = made
            value_s, main_s = new_value_s, new_main_s
            start_s, new_start_s = new_start_s, start_s
            ready_s, new_ready_s = new_ready_s, ready_s
            total = live[target - 1] if target > offset[rank] else 0.0
            for at in range(target, source + 1):
                total += change[letters[at] // positions, letters[at] % positions]
                live[at] = total
        else:
            shift(letters, target, source)
