"""List decoder: target times and waiting tolerances in, an order out that never deadlocks and keeps the caps.

Each rank looks at the actions whose predecessors are placed, so that their earliest starts are known. Among those that
could start within `patience` of the earliest one it wants the smallest target; the rank whose choice starts first is
served. A target of minus infinity on I is "backward first", plus infinity on W is "W fills gaps", a difference between F and
I is a warm-up count, patience is lookahead: the classical list heuristics are points of this space.

A forward is admitted under the banker's rule (Dijkstra, 1965): after it, on its rank, for the microbatches in flight from the oldest
to the youngest, what microbatch i still needs must fit into the free memory plus all that older ones hold. The state
stays safe for ever: only F consumes memory and F is checked; the oldest unfinished microbatch can always go on, since its
F lowers need and free together and raises held by as much. So some action is always executable. With `strict` the simpler rule is used: free memory
must hold all later chunks of the rank. It is safe too, and forbids some states, which at times leads to better orders.

With several chains the banker counts the chains' microbatches in turn, k of every chain before k + 1 of any: one order of all units on all
ranks, whichever has reached a rank. The simpler rule is not safe there, since chains can block each other in a circle, and is not used.

O(actions * (ranks + letters of a rank + microbatches in flight)). Not optimal: no order is excluded, but which targets
produce a good one is what the callers search for.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from stagewright.planner.schedules.auto.instance import Floats, Instance, Ints, Tables


def decode_targets(
    instance: Instance, target_s: Floats, patience_s: Floats, *, strict: bool = False
) -> tuple[float, Ints]:
    """Return makespan and words for targets [num_actions] and patience [num_letters]."""
    words = empty_words(instance)
    stages = stages_by_rank(instance)
    return float(decode(instance.tables, instance.costs.activation, stages, target_s, patience_s, strict, words)), words


def empty_words(instance: Instance) -> Ints:
    """Return words of the right shape, filled with -1."""
    return np.full((instance.num_ranks, int(instance.tables.lengths.max())), -1, dtype=np.int32)


def stages_by_rank(instance: Instance) -> Ints:
    """Return the stages of each rank in model order, padded with -1, int32 [num_ranks, most chunks]."""
    chunks = np.bincount(instance.placement, minlength=instance.num_ranks)
    stages = np.full((instance.num_ranks, int(chunks.max())), -1, dtype=np.int32)
    for rank in range(instance.num_ranks):
        own = np.flatnonzero(instance.placement == rank)
        stages[rank, : len(own)] = own
    return stages


@njit(cache=True)
def decode(
    tables: Tables, activation: Floats, stages: Ints, target_s: Floats, patience_s: Floats, strict: bool, words: Ints
) -> float:
    """Return the makespan; `words` is overwritten with the order."""
    num_ranks, microbatches = len(tables.lengths), tables.num_microbatches
    num_letters = len(tables.rank)
    end_s = np.full(num_letters * microbatches, np.inf)
    placed = np.zeros(num_letters, dtype=np.int32)
    position = np.zeros(num_ranks, dtype=np.int32)
    free_s = np.zeros(num_ranks)
    live = np.zeros(num_ranks)
    chains = tables.num_chains
    in_chain = num_letters // 3 // chains
    held = np.zeros((num_ranks, microbatches * chains))
    need = np.zeros((num_ranks, microbatches * chains))
    for rank in range(num_ranks):
        for stage in stages[rank]:
            if stage >= 0:
                need[rank, stage // in_chain :: chains] += activation[stage]
    oldest = np.zeros(num_ranks, dtype=np.int32)
    choice = np.full(num_ranks, -1, dtype=np.int32)
    choice_s = np.full(num_ranks, np.inf)
    stale = np.ones(num_ranks, dtype=np.bool_)
    makespan = 0.0
    for _ in range(num_letters * microbatches):
        best = -1
        for rank in range(num_ranks):
            if stale[rank]:
                stale[rank] = False
                choice[rank], choice_s[rank] = _choose(
                    rank,
                    tables,
                    activation,
                    stages,
                    target_s,
                    patience_s,
                    strict,
                    end_s,
                    placed,
                    free_s,
                    live,
                    held,
                    need,
                    oldest,
                )
            if choice[rank] >= 0 and (best < 0 or choice_s[rank] < choice_s[best]):
                best = rank
        if best < 0:
            return np.inf
        letter = choice[best]
        microbatch = placed[letter]
        action = letter * microbatches + microbatch
        end_s[action] = choice_s[best] + tables.duration_s[letter]
        free_s[best] = end_s[action]
        makespan = max(makespan, end_s[action])
        words[best, position[best]] = action
        position[best] += 1
        placed[letter] += 1
        live[best] += tables.held[letter]
        unit = microbatch * chains + letter // 3 // in_chain
        held[best, unit] += tables.held[letter]
        if letter % 3 == 0:
            need[best, unit] -= activation[letter // 3]
        if letter % 3 == 2:
            finished = microbatches * chains
            for stage in stages[best]:
                if stage >= 0:
                    finished = min(finished, placed[3 * stage + 2] * chains + stage // in_chain)
            oldest[best] = finished
        stale[best] = True
        after = tables.successor[letter]
        if after >= 0:
            stale[tables.rank[after]] = True
    return makespan


@njit(cache=True, no_cpython_wrapper=True)
def _choose(
    rank: int,
    tables: Tables,
    activation: Floats,
    stages: Ints,
    target_s: Floats,
    patience_s: Floats,
    strict: bool,
    end_s: Floats,
    placed: Ints,
    free_s: Floats,
    live: Floats,
    held: Floats,
    need: Floats,
    oldest: Ints,
) -> tuple[int, float]:
    """Return the letter that this rank wants next and its start, or (-1, inf)."""
    microbatches, chains = tables.num_microbatches, tables.num_chains
    in_chain = len(tables.rank) // 3 // chains
    started = 0
    for stage in stages[rank]:
        if stage >= 0 and placed[3 * stage] > 0:
            started = max(started, (placed[3 * stage] - 1) * chains + stage // in_chain + 1)
    earliest = np.inf
    for sweep in range(2):
        best, best_s, best_target = -1, np.inf, np.inf
        for stage in stages[rank]:
            if stage < 0:
                continue
            for kind in range(3):
                letter = 3 * stage + kind
                microbatch = placed[letter]
                if microbatch >= microbatches:
                    continue
                start = free_s[rank]
                before = tables.predecessor[letter]
                if before >= 0:
                    if placed[before] <= microbatch:
                        continue
                    start = max(start, end_s[before * microbatches + microbatch] + tables.delay_s[letter])
                if sweep == 1 and start > earliest + patience_s[letter]:
                    continue
                if kind == 0 and not _admits(
                    rank,
                    stage,
                    microbatch * chains + stage // in_chain,
                    tables,
                    activation,
                    stages,
                    strict and chains == 1,
                    live,
                    held,
                    need,
                    oldest,
                    started,
                ):
                    continue
                if sweep == 0:
                    earliest = min(earliest, start)
                    continue
                target = target_s[letter * microbatches + microbatch]
                if best < 0 or target < best_target or (target == best_target and start < best_s):
                    best, best_s, best_target = letter, start, target
        if earliest == np.inf:
            return -1, np.inf
    return best, best_s


@njit(cache=True, no_cpython_wrapper=True)
def _admits(
    rank: int,
    stage: int,
    unit: int,
    tables: Tables,
    activation: Floats,
    stages: Ints,
    strict: bool,
    live: Floats,
    held: Floats,
    need: Floats,
    oldest: Ints,
    started: int,
) -> bool:
    """Return whether a forward leaves the rank in a safe state."""
    free = tables.cap[rank] - live[rank] - activation[stage]
    if free < 0.0:
        return False
    if free == np.inf:
        return True
    if strict:
        later = 0.0
        for other in stages[rank]:
            if other > stage:
                later += activation[other]
        return bool(later <= free)
    reach = free
    for other in range(oldest[rank], max(started, unit + 1)):
        extra = activation[stage] if other == unit else 0.0
        if need[rank, other] - extra > reach:
            return False
        reach += held[rank, other] + extra
    return True
