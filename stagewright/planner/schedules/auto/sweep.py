"""Times of an order: one longest-path sweep, as lean as possible.

An order is `words`, int32 [num_ranks, longest word], the actions of each rank in sequence. Each action starts when the
one before it on its rank has ended and its predecessor's result has arrived, so the times are longest paths in an
acyclic graph and the sweep is O(number of actions): ranks run until they wait, an action that ends wakes the one
rank that waits for it. A cycle, that is a deadlock, leaves ranks waiting when the stack runs empty.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.auto.instance import Floats, Instance, Ints, Tables

DEADLOCK = np.inf


@njit(cache=True)
def sweep(tables: Tables, words: Ints, end_s: Floats) -> float:
    """Return the makespan, or infinity on a deadlock; `end_s` [num_actions] is overwritten with the end times."""
    num_ranks = len(tables.lengths)
    num_microbatches = tables.num_microbatches
    position = np.zeros(num_ranks, dtype=np.int32)
    free_s = np.zeros(num_ranks)
    waiting = np.full(num_ranks, -1, dtype=np.int32)  # the action that each rank waits for
    stack = np.arange(num_ranks - 1, -1, -1).astype(np.int32)
    depth = num_ranks
    end_s[:] = np.inf
    makespan = 0.0
    finished = 0
    while depth > 0:
        depth -= 1
        rank = stack[depth]
        time = free_s[rank]
        at = position[rank]
        length = tables.lengths[rank]
        while at < length:
            action = words[rank, at]
            letter = action // num_microbatches
            microbatch = action - letter * num_microbatches
            before = tables.predecessor[letter]
            if before >= 0:
                arrived = end_s[before * num_microbatches + microbatch] + tables.delay_s[letter]
                if arrived == np.inf:
                    waiting[rank] = before * num_microbatches + microbatch
                    break
                time = max(time, arrived)
            time += tables.duration_s[letter]
            end_s[action] = time
            at += 1
            after = tables.successor[letter]
            if after >= 0:
                neighbour = tables.rank[after]
                if waiting[neighbour] == action:
                    waiting[neighbour] = -1
                    stack[depth] = neighbour
                    depth += 1
        free_s[rank] = time
        position[rank] = at
        if at == length:
            finished += 1
            makespan = max(makespan, time)
    return makespan if finished == num_ranks else np.inf


def end_times(instance: Instance, words: Ints) -> tuple[float, Floats]:
    """Return the makespan of an order (infinite on a deadlock) and the end time of each action, [num_actions]."""
    end_s = np.empty(instance.num_actions)
    return float(sweep(instance.tables, words, end_s)), end_s


def start_times(instance: Instance, end_s: Floats) -> Floats:
    """Return the start time of each action, given the end times."""
    return end_s - np.repeat(instance.tables.duration_s, instance.num_microbatches)


def longest_span(instance: Instance, words: Ints, end_s: Floats) -> float:
    """Return the longest time from a rank's first start to its last end."""
    start_s = start_times(instance, end_s)
    lengths: npt.NDArray[np.int32] = instance.tables.lengths
    return max(float(end_s[words[r, lengths[r] - 1]] - start_s[words[r, 0]]) for r in range(instance.num_ranks))
