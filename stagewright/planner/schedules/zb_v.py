"""ZB-V: two chunks folded in a V, no idle time inside a rank's span at the memory of 1F1B.

Rank d holds stages d and 2 D - 1 - d, so the last stage's rank is the first's and the turn in the middle needs no hop.
Rank d runs, with `f`, `i`, `w` on the way down and capitals on the way up:

    2 (D - d) - 1  x  f
    d              x  F f
    D - d          x  F I W
    while forwards are left: [f] i w F I W
    d              x  i I
    D - d          x  i w
    the remaining W

With D = 2, T = 4:

    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 0I2 3W3 0I3 0W2 0W3
    rank 1      1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 1I2 2I3 1I3 2W2 1W2 2W3 1W3

With F = I = W and T >= 2 D no rank idles inside its span and each holds D activations; the makespan adds the skew
(D - 1) F / 2 of the last rank's first forward. The places of the W follow the costs and the latency
(`weight_placement`); the order of F and I is fixed.

Paper: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 6 (ZB-V); V-ZB of Qi et al., Pipeline Parallelism
with Controllable Memory, NeurIPS 2024, is the same schedule up to left-shifting.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from stagewright.planner.schedules.descent import Goal
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.list_scheduling import Words, orders_of, requested_chains
from stagewright.planner.schedules.schedule import Schedule, wave_placement
from stagewright.planner.schedules.sizes import check_placement, effort_of, sizes_of
from stagewright.planner.schedules.weight_placement import place_by_cost


def zb_v(request: ScheduleRequest) -> Schedule:
    """Return the V-folded order of F and I with the W placed by cost, at most D activations on a rank."""
    sizes = sizes_of(request, "zb-v", default_chunks=2, least_chunks=2, most_chunks=2)
    placement = wave_placement(sizes.num_ranks)
    check_placement(request, placement, "zb-v")
    chains = requested_chains(request, sizes, placement)
    skeleton = _skeleton(sizes.num_ranks, sizes.num_microbatches)
    cap = np.full(sizes.num_ranks, 2.0 * sizes.num_ranks)
    words = place_by_cost(chains, [skeleton], cap, Goal(1.0, 2.0), budget=effort_of(request))
    assert words is not None, "the W right after its I keeps the cap"
    return Schedule("zb-v", sizes.num_microbatches, placement, orders_of(chains, words, 1))


@njit(cache=True)
def _skeleton(num_ranks: int, num_microbatches: int) -> Words:
    """Return F and I of all ranks; fewer than 2 D - 1 microbatches leave out what they lack."""
    positions, per_rank = 2 * num_ranks, 4 * num_microbatches
    letters = np.empty(num_ranks * per_rank, dtype=np.int32)
    full = max(2 * num_ranks - 1, num_microbatches)
    for rank in range(num_ranks):
        down, up = rank, positions - 1 - rank
        at, count = rank * per_rank, np.zeros(2 * positions, dtype=np.int64)
        for _ in range(2 * (num_ranks - rank) - 1):
            at = _put(letters, at, count, down, num_microbatches)
        for _ in range(rank):
            at = _put(letters, at, count, up, num_microbatches)
            at = _put(letters, at, count, down, num_microbatches)
        for _ in range(num_ranks - rank):
            at = _put(letters, at, count, up, num_microbatches)
            at = _put(letters, at, count, positions + up, num_microbatches)
        while count[up] < count[down] or count[down] < full:
            if count[down] < full:
                at = _put(letters, at, count, down, num_microbatches)
            at = _put(letters, at, count, positions + down, num_microbatches)
            at = _put(letters, at, count, up, num_microbatches)
            at = _put(letters, at, count, positions + up, num_microbatches)
        for _ in range(rank):
            at = _put(letters, at, count, positions + down, num_microbatches)
            at = _put(letters, at, count, positions + up, num_microbatches)
        for _ in range(num_ranks - rank):
            at = _put(letters, at, count, positions + down, num_microbatches)
    return Words(letters, np.arange(num_ranks + 1) * per_rank)


@njit(cache=True, no_cpython_wrapper=True)
def _put(letters: np.ndarray, at: int, count: np.ndarray, letter: int, num_microbatches: int) -> int:
    """Append the letter unless its microbatch does not exist; return the next place."""
    count[letter] += 1
    if count[letter] > num_microbatches:
        return at
    letters[at] = letter
    return at + 1


FAMILY = ScheduleFamily(
    "zb-v",
    "Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024",
    zb_v,
    aliases=("v-zb", "zbv", "zbvzerobubble"),
    split_backward=True,
    default_chunks=2,
    improves=True,
    fixed_order=True,
    held_chunks=lambda num_ranks: 2 * num_ranks,
)
