"""Repeating building blocks: one microbatch's actions on a V of 2 D chunks, repeated with a fixed period.

With unit F, I and W of a chunk the period is 6 slots on every rank. A block is given by the slots that F0, F1, I1 and I0
move from one rank to the next (chunk 0 goes down the ranks, chunk 1 up, the gradients back) and by the gaps at the three
turns: F0 -> F1 on the last rank, F1 -> I1 on the first, I1 -> I0 on the last. It repeats without conflict when the four
starts have distinct residues modulo 6 on every rank; W1 and W0 then take the two free residues, each at its earliest
slot after its I. A rank's steady peak is, over the slots x of a period,

    max_x  sum over its chunks of  floor((x - F) / 6) - floor((x - end of W) / 6)

activations, and the transient holds a subset of that. Repeated, sorted into an order for each rank and shifted left,
the block is a schedule that cannot deadlock, since it is a schedule in time. Equal offsets need odd gaps between the
classes F0/I1 and F1/I0, which move in opposite directions; `v_blocks` simply tries all gaps of 1 to 6 slots.

Paper: Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024, section 3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numba import njit

from stagewright.planner.schedules.descent import Goal, descend
from stagewright.planner.schedules.list_scheduling import (
    BACKWARD,
    FORWARD,
    WEIGHT,
    Chains,
    Floats,
    Ints,
    Words,
    measure,
)
from stagewright.planner.schedules.weight_placement import place_weight_gradients

PERIOD = 6
_DESCENTS = 4  # from the best candidate, with their own seeds
_TOLERANCES = (0.0, 0.25, 0.5, 1.0)  # of W, see `weight_placement`


@dataclass(frozen=True, eq=False)
class Block:
    """Start slots of one microbatch's actions, [3, 2 D] over (F, I, W) and stage, and the steady peak in chunks."""

    slots: Ints
    peak_chunks: int
    gaps: tuple[int, ...]


def v_blocks(num_ranks: int, offsets: tuple[int, int, int, int]) -> list[Block]:
    """Return the conflict-free blocks of least peak with the given offsets (F0, F1, I1, I0), shortest first."""
    blocks = []
    for gaps in itertools.product(range(1, PERIOD + 1), repeat=3):
        slots = np.empty((3, 2 * num_ranks), dtype=np.int64)
        peak = _place_block(num_ranks, np.array(offsets), np.array(gaps), slots)
        if peak >= 0:
            blocks.append(Block(slots, int(peak), gaps))
    least = min(block.peak_chunks for block in blocks)
    return sorted((b for b in blocks if b.peak_chunks == least), key=lambda b: (int(b.slots.max()), b.gaps))


def block_peak(num_ranks: int, offsets: tuple[int, int, int, int]) -> int:
    """Return the live chunks on each rank in the steady state of the best block with the given offsets."""
    return v_blocks(num_ranks, offsets)[0].peak_chunks


@njit(cache=True)
def _place_block(num_ranks: int, offsets: Ints, gaps: Ints, slots: Ints) -> int:
    """Fill the start slots and return the steady peak in chunks, -1 on a conflict."""
    last = 2 * num_ranks - 1
    for rank in range(num_ranks):
        from_end = num_ranks - 1 - rank
        turn = (num_ranks - 1) * offsets[0] + gaps[0]
        slots[FORWARD, rank] = rank * offsets[0]
        slots[FORWARD, last - rank] = turn + from_end * offsets[1]
        turn += (num_ranks - 1) * offsets[1] + gaps[1]
        slots[BACKWARD, last - rank] = turn + rank * offsets[2]
        turn += (num_ranks - 1) * offsets[2] + gaps[2]
        slots[BACKWARD, rank] = turn + from_end * offsets[3]
    most = 0
    for rank in range(num_ranks):
        taken = np.zeros(PERIOD, dtype=np.bool_)
        for kind in (FORWARD, BACKWARD):
            for stage in (rank, last - rank):
                residue = slots[kind, stage] % PERIOD
                if taken[residue]:
                    return -1
                taken[residue] = True
        for stage in (last - rank, rank):
            slot = slots[BACKWARD, stage] + 1
            while taken[slot % PERIOD]:
                slot += 1
            taken[slot % PERIOD] = True
            slots[WEIGHT, stage] = slot
        for slot in range(PERIOD):
            live = 0
            for stage in (rank, last - rank):
                live += (slot - slots[FORWARD, stage]) // PERIOD - (slot - slots[WEIGHT, stage] - 1) // PERIOD
            most = max(most, live)
    return most


@njit(cache=True)
def repeat(chains: Chains, slots: Ints, num_microbatches: int, kinds: int) -> Words:
    """Return the words of the repeated block: for each rank its letters in the order of slot + 6 * microbatch."""
    positions, num_ranks = len(chains.rank), len(chains.first_member) - 1
    offset = np.zeros(num_ranks + 1, dtype=np.int64)
    for position in range(positions):
        offset[chains.rank[position] + 1] += kinds * num_microbatches
    offset = np.cumsum(offset)
    letters = np.empty(offset[num_ranks], dtype=np.int32)
    done = np.zeros(3 * positions, dtype=np.int64)
    for rank in range(num_ranks):
        low, high = chains.first_member[rank], chains.first_member[rank + 1]
        for at in range(offset[rank], offset[rank + 1]):
            best, best_slot = -1, 0
            for index in range(low, high):
                position = chains.member[index]
                for kind in range(kinds):
                    letter = kind * positions + position
                    slot = slots[kind, position] + PERIOD * done[letter]
                    if done[letter] < num_microbatches and (best < 0 or slot < best_slot):
                        best, best_slot = letter, slot
            letters[at] = best
            done[best] += 1
    return Words(letters, offset)


def best_of_blocks(chains: Chains, blocks: list[Block], cap: Floats, goal: Goal, *, budget: float) -> Words:
    """Return the best words made of the blocks: repeated, their W placed by cost, the best of them improved by descent."""
    num_microbatches = int(chains.units[0])
    weight_s = float(chains.seconds[WEIGHT].mean())
    most_waiting = np.full(len(cap), np.iinfo(np.int64).max)
    best, best_s, spent = Words(np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)), np.inf, 0.0
    for block in blocks:
        if best_s < np.inf and spent > 0.3 * budget:
            break
        whole, skeleton = (repeat(chains, block.slots, num_microbatches, kinds) for kinds in (3, 2))
        candidates = itertools.chain(
            [whole],
            (
                place_weight_gradients(chains, skeleton, cap, forward * weight_s, backward * weight_s, most_waiting)
                for forward, backward in itertools.product(_TOLERANCES, repeat=2)
            ),
        )
        for words in candidates:
            value_s = goal.value_s(measure(chains, words))
            spent += 8.0 * len(whole.letters)
            if value_s < best_s:
                best, best_s = words, value_s
            if words is not whole and spent > 0.3 * budget:
                break
    return improve(chains, best, cap, goal, budget=budget - spent)


def improve(chains: Chains, words: Words, cap: Floats, goal: Goal, *, budget: float) -> Words:
    """Return the best words that a few descents from the given ones reach, the budget shared among them."""
    moves = int(budget / _DESCENTS / len(words.letters))
    if moves <= 0:
        return words
    ends = [descend(chains, words, cap, goal, moves=moves, seed=seed) for seed in range(1, _DESCENTS + 1)]
    return min(ends, key=lambda words: goal.value_s(measure(chains, words)))
