"""A rank's order as a word over its letters, and the way to and from a schedule.

With equal microbatches some optimal schedule runs the microbatches of every letter in order: relabel the k-th start
of each letter as microbatch k. When F_s starts for the k-th time, k + 1 different forwards of stage s - 1 have
arrived, so the one that is now labelled k is among them; the same holds for I and W, and live memory does not see labels.
So an order is a word in which each of the 3 v letters of a rank occurs T times, and only the interleaving is free.

A full backward is written as I followed at once by W. That never lengthens the makespan and keeps the peak, since
the input gradient leaves earlier and nothing else moves.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.auto.instance import Floats, Instance, Ints, Tables
from stagewright.planner.schedules.auto.sweep import end_times
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, REPLICA, STAGE, Orders, Schedule

_LETTER_KINDS = {Kind.F: (0,), Kind.I: (1,), Kind.W: (2,), Kind.B: (1, 2), Kind.R: ()}


def words_of(schedule: Schedule, instance: Instance) -> Ints | None:
    """Return the words of a schedule with every B split, or None where it is no order of this instance.

    None means: another number of copies, slices, fused or foreign actions, another placement, a stage graph that is not a chain,
    or an action that is missing.
    """
    chains = instance.num_chains
    stages = instance.num_stages // chains
    chain = tuple((stage, stage + 1) for stage in range(stages - 1))
    if schedule.num_replicas != chains or schedule.num_slices != 1 or schedule.edges != chain:
        return None
    if schedule.num_microbatches != chains * instance.num_microbatches or schedule.num_ranks != instance.num_ranks:
        return None
    if not np.array_equal(schedule.placement.ravel(), instance.placement):
        return None
    lengths = instance.tables.lengths
    words = np.full((instance.num_ranks, int(lengths.max())), -1, dtype=np.int32)
    for rank, order in enumerate(schedule.orders):
        if order[:, FUSED].any() or not set(order[:, KIND].tolist()) <= set(_LETTER_KINDS):
            return None
        letters = [
            3 * (replica * stages + stage) + part
            for kind, replica, stage in order[:, [KIND, REPLICA, STAGE]].tolist()
            for part in _LETTER_KINDS[Kind(kind)]
        ]
        if len(letters) != lengths[rank]:
            return None
        word = label(np.array(letters, dtype=np.int32), instance.num_microbatches)
        if word is None:
            return None
        words[rank, : len(word)] = word
    return words


def label(letters: Ints, num_microbatches: int) -> Ints | None:
    """Return the actions of a word of letters, the k-th occurrence of each on microbatch k; None unless each occurs T times."""
    by_letter = np.argsort(letters, kind="stable")
    _, counts = np.unique(letters, return_counts=True)
    if (counts != num_microbatches).any():
        return None
    microbatch = np.empty(len(letters), dtype=np.int32)
    microbatch[by_letter] = np.tile(np.arange(num_microbatches, dtype=np.int32), len(counts))
    word: Ints = (letters * num_microbatches + microbatch).astype(np.int32)
    return word


def peaks(instance: Instance, words: Ints) -> Floats:
    """Return the highest live activation of each rank, [num_ranks]."""
    held = instance.tables.held
    return np.array(
        [
            np.cumsum(held[words[rank, :length] // instance.num_microbatches]).max()
            for rank, length in enumerate(instance.tables.lengths)
        ]
    )


def fits(instance: Instance, words: Ints) -> bool:
    """Return whether every rank stays within its cap."""
    return bool((peaks(instance, words) <= instance.tables.cap).all())


def schedule_of(instance: Instance, words: Ints, *, name: str = "auto", merge: bool = True) -> Schedule:
    """Return the schedule of an order; adjacent I, W become B where the makespan stays the same, unless `merge` is off."""
    fused = merged_backwards(instance, words) if merge else np.zeros(instance.num_actions, dtype=np.bool_)
    orders = tuple(
        _orders(instance, words[rank, :length], fused) for rank, length in enumerate(instance.tables.lengths)
    )
    return Schedule(
        name=name,
        num_microbatches=instance.num_chains * instance.num_microbatches,
        placement=instance.placement.reshape(instance.num_chains, -1).astype(np.int32),
        orders=orders,
    )


def _orders(instance: Instance, word: Ints, fused: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Orders:
    """Return the rows of a word; microbatch k of chain c of C is microbatch k C + c of the schedule."""
    letter, microbatch = word // instance.num_microbatches, word % instance.num_microbatches
    part = letter % 3
    replica, stage = np.divmod(letter // 3, instance.num_stages // instance.num_chains)
    is_fused = fused[word]
    kind = np.array([Kind.F, Kind.I, Kind.W], dtype=np.int32)[part]
    kind[is_fused & (part == 1)] = Kind.B
    keep = ~(is_fused & (part == 2))
    orders = np.zeros((int(keep.sum()), 6), dtype=np.int32)
    orders[:, KIND] = kind[keep]
    orders[:, REPLICA] = replica[keep]
    orders[:, STAGE] = stage[keep]
    orders[:, MICROBATCH] = (microbatch * instance.num_chains + replica)[keep]
    orders[:, 4] = -1
    return orders


def merged_backwards(instance: Instance, words: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which I and W actions run as one B, bool [num_actions], without a longer makespan.

    A B sends its input gradient only after its W. All adjacent pairs are tried at once; when that costs time, the pairs
    are bisected, so a few pairs that matter cost a few sweeps each.
    """
    tables, microbatches = instance.tables, instance.num_microbatches
    makespan_s, _ = end_times(instance, words)
    limit_s = makespan_s + instance.time_slack_s
    pairs = _adjacent_pairs(instance, words)
    late_s = np.zeros(instance.num_actions)
    weight_grad_s = tables.duration_s[pairs // microbatches + 1]

    def accept(low: int, high: int) -> None:
        late_s[pairs[low:high]] = weight_grad_s[low:high]
        if low < high and _late_makespan(tables, words, late_s) > limit_s:
            late_s[pairs[low:high]] = 0.0
            if high - low > 1:
                middle = (low + high) // 2
                accept(low, middle)
                accept(middle, high)

    accept(0, len(pairs))
    fused = np.zeros(instance.num_actions, dtype=np.bool_)
    chosen = pairs[late_s[pairs] > 0.0]
    fused[chosen] = True
    fused[chosen + microbatches] = True
    return fused


def fused_makespan(instance: Instance, words: Ints, fused: Ints) -> float:
    """Return the makespan when the given input-gradient actions and the W behind them run as one B each."""
    microbatches = instance.num_microbatches
    late_s = np.zeros(instance.num_actions)
    late_s[fused] = instance.tables.duration_s[fused // microbatches + 1]
    return float(_late_makespan(instance.tables, words, late_s))


def _adjacent_pairs(instance: Instance, words: Ints) -> Ints:
    found = []
    for rank, length in enumerate(instance.tables.lengths):
        word = words[rank, :length]
        is_input_grad = (word[:-1] // instance.num_microbatches) % 3 == 1
        found.append(word[:-1][is_input_grad & (word[1:] == word[:-1] + instance.num_microbatches)])
    return np.concatenate(found).astype(np.int32)


@njit(cache=True)
def _late_makespan(tables: Tables, words: Ints, late_s: Floats) -> float:
    """Return the makespan when the result of each action leaves `late_s` after its end."""
    num_ranks, microbatches = len(tables.lengths), tables.num_microbatches
    end_s = np.full(late_s.shape[0], np.inf)
    position = np.zeros(num_ranks, dtype=np.int32)
    free_s = np.zeros(num_ranks)
    moved = True
    while moved:
        moved = False
        for rank in range(num_ranks):
            while position[rank] < tables.lengths[rank]:
                action = words[rank, position[rank]]
                letter = action // microbatches
                before = tables.predecessor[letter]
                time = free_s[rank]
                if before >= 0:
                    source = before * microbatches + action % microbatches
                    if end_s[source] == np.inf:
                        break
                    late = late_s[source] if tables.rank[before] != rank else 0.0
                    time = max(time, end_s[source] + late + tables.delay_s[letter])
                free_s[rank] = end_s[action] = time + tables.duration_s[letter]
                position[rank] += 1
                moved = True
    for rank in range(num_ranks):
        if position[rank] < tables.lengths[rank]:
            return np.inf
    return float(free_s.max())
