"""1F1B-V: full backwards on a V of two chunks, three quarters of 1F1B's memory without splitting the backward.

With unit F and B of two units a chunk, a rank's repeating block fills its period of 6 slots with F0, F1, B1, B1, B0, B0 and
no hole. Relative to F0 there are six such tilings. From a rank to the next the four actions move by at least
(1, 1, 2, 2) slots, and both ranks must be tiled, so the moves come from a walk over the tilings:

    cost(d + 1, t') = min over t, f0 of  cost(d, t) + f0 + f1 + b1 + b0,   f1, b1, b0 the least moves that lead t to t'

The least total of moves and turn gaps is the shortest life of a microbatch on the first rank, about 9 D slots, which
makes a peak of about 3 D / 4 activations. One offset for all ranks, as V-Half has, cannot do better than D here. The
best blocks are repeated, shifted left and improved for the costs (`building_block`).

With D = 2, T = 3 and B = F:

    rank 0  0F0 0F1 0F2 3F0 3B0 3F1 3B1 0B0     3F2 3B2 0B1     0B2
    rank 1      1F0 2F0 1F1 2F1 2B0 1B0 1F2 2F2 2B1 1B1 2B2 1B2

Paper: Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024 (the schedule v1f1b of its code).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

from stagewright.planner.schedules.building_block import PERIOD, improve, repeat
from stagewright.planner.schedules.descent import Goal
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.list_scheduling import (
    BACKWARD,
    FORWARD,
    Chains,
    Ints,
    Words,
    measure,
    orders_of,
    peak_held,
    requested_chains,
)
from stagewright.planner.schedules.schedule import Schedule, wave_placement
from stagewright.planner.schedules.sizes import check_placement, effort_of, sizes_of

_KEPT = 8  # walks of least cost that are kept for each tiling
_TILINGS = tuple(
    (f1, b1, b0)
    for f1, b1, b0 in itertools.product(range(1, PERIOD), repeat=3)
    if sorted((f1, b1, b1 + 1, b0, b0 + 1)) == list(range(1, PERIOD))
)


@dataclass(frozen=True, slots=True)
class _Walk:
    """Tilings (F1, B1, B0 relative to F0) of ranks 0, 1, ... and the moves (F0, F1, B1, B0) between them."""

    tilings: tuple[tuple[int, int, int], ...]
    moves: tuple[tuple[int, int, int, int], ...] = ()


def one_f_one_b_v(request: ScheduleRequest) -> Schedule:
    """Return the V-folded order of forwards and full backwards with about 3 D / 4 activations on a rank."""
    sizes = sizes_of(request, "1f1b-v", default_chunks=2, least_chunks=2, most_chunks=2)
    ranks, microbatches = sizes.num_ranks, sizes.num_microbatches
    placement = wave_placement(ranks)
    check_placement(request, placement, "1f1b-v")
    chains = requested_chains(request, sizes, placement, is_split=False)
    goal, budget = Goal(1.0, 0.1), effort_of(request, actions=3.2e7)
    words, peak, spent = _best_block(chains, goal, ranks, microbatches, 0.3 * budget)
    words = improve(chains, words, np.full(ranks, peak), goal, budget=budget - spent)
    return Schedule("1f1b-v", microbatches, placement, orders_of(chains, words, 1))


def _best_block(
    chains: Chains, goal: Goal, num_ranks: int, num_microbatches: int, budget: float
) -> tuple[Words, float, float]:
    """Return the repeated block of least peak and then least value, its peak in chunks, and the actions spent."""
    best: tuple[tuple[float, float], Words] | None = None
    spent = 0.0
    for slots in v_slots(num_ranks):
        if best is not None and spent > budget:
            break
        words = repeat(chains, slots, num_microbatches, 2)
        value = float(peak_held(chains, words).max()), goal.value_s(measure(chains, words))
        spent += 4.0 * len(words.letters)
        if best is None or value < best[0]:
            best = value, words
    assert best is not None, "every number of ranks has a walk"
    return best[1], best[0][0], spent


@cache
def v_slots(num_ranks: int) -> tuple[Ints, ...]:
    """Return start slots [2, 2 D] over (F, B) and stage of the blocks with the shortest life, all walks that were kept."""
    walks: dict[tuple[int, int, int], tuple[int, list[_Walk]]] = {
        tiling: (_least(tiling[1] - tiling[0], 1), [_Walk((tiling,))]) for tiling in _TILINGS
    }
    for _ in range(num_ranks - 1):
        walks = _extend(walks)
    lives = {
        tiling: (life + _least(tiling[0], 1) + _least(tiling[2] - tiling[1], 2), kept)
        for tiling, (life, kept) in walks.items()
    }
    shortest = min(life for life, _ in lives.values())
    return tuple(_slots(walk) for life, kept in lives.values() if life == shortest for walk in kept)


def _extend(
    walks: dict[tuple[int, int, int], tuple[int, list[_Walk]]],
) -> dict[tuple[int, int, int], tuple[int, list[_Walk]]]:
    longer: dict[tuple[int, int, int], tuple[int, list[_Walk]]] = {}
    for (tiling, (life, kept)), following, f0 in itertools.product(walks.items(), _TILINGS, range(1, PERIOD + 1)):
        moves = (
            f0,
            _least(tiling[0] - following[0] - f0, 1),
            _least(following[1] - tiling[1] + f0, 2),
            _least(tiling[2] - following[2] - f0, 2),
        )
        cost = life + sum(moves)
        known, same = longer.get(following, (cost + 1, []))
        if cost < known:
            same = []
        if cost <= known:
            same = [*same, *(_Walk((*walk.tilings, following), (*walk.moves, moves)) for walk in kept)][:_KEPT]
            longer[following] = cost, same
    return longer


def _least(residue: int, bound: int) -> int:
    """Return the least number of at least `bound` that is congruent to `residue` modulo the period."""
    return bound + (residue - bound) % PERIOD


def _slots(walk: _Walk) -> Ints:
    ranks = len(walk.tilings)
    last = 2 * ranks - 1
    slots = np.zeros((2, 2 * ranks), dtype=np.int64)
    for rank in range(1, ranks):
        slots[FORWARD, rank] = slots[FORWARD, rank - 1] + walk.moves[rank - 1][0]
    slots[FORWARD, ranks] = slots[FORWARD, ranks - 1] + _least(walk.tilings[-1][0], 1)
    for rank in range(ranks - 2, -1, -1):
        slots[FORWARD, last - rank] = slots[FORWARD, last - rank - 1] + walk.moves[rank][1]
    first = walk.tilings[0]
    slots[BACKWARD, last] = slots[FORWARD, last] + _least(first[1] - first[0], 1)
    for rank in range(1, ranks):
        slots[BACKWARD, last - rank] = slots[BACKWARD, last - rank + 1] + walk.moves[rank - 1][2]
    turn = walk.tilings[-1]
    slots[BACKWARD, ranks - 1] = slots[BACKWARD, ranks] + _least(turn[2] - turn[1], 2)
    for rank in range(ranks - 2, -1, -1):
        slots[BACKWARD, rank] = slots[BACKWARD, rank + 1] + walk.moves[rank][3]
    return slots


FAMILY = ScheduleFamily(
    "1f1b-v",
    "Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024",
    one_f_one_b_v,
    aliases=("v-1f1b",),
    default_chunks=2,
    improves=True,
)
