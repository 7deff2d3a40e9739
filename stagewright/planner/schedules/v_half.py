"""V-Half: a V of two chunks on each rank whose repeating block holds half the activations of 1F1B.

The block moves F0, F1, I1, I0 by (1, 2, 1, 2) slots from rank to rank (`building_block`); a microbatch lives about 6 D
slots on every rank, so the peak is (D + 2) // 2 activations, the same everywhere. With F = I = W and T = 6 D the
longest span has a bubble of about D / (2 T); the W, the warm-up and the cool-down are then placed by cost, which takes
about half of that away and keeps the peak.

With D = T = 3:

    rank 0  0F0 0F1 0F2         5F0 5I0 5W0 5F1 5I1 5W1 0I0 0W0         5F2 5I2 0I1 0W1 5W2     0I2 0W2
    rank 1      1F0 1F1     4F0     4F1 4I0 4W0 1F2 1I0 1W0 4I1 4W1 4F2     1I1 4I2 1W1 4W2 1I2 1W2
    rank 2          2F0 3F0 2F1 3F1         3I0 2I0 3W0 2F2 2W0 3F2 3I1 2I1 2W1 3W1 3I2 2I2 2W2 3W2

Paper: Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.building_block import best_of_blocks, block_peak, v_blocks
from stagewright.planner.schedules.descent import Goal
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.list_scheduling import orders_of, requested_chains
from stagewright.planner.schedules.schedule import Schedule, wave_placement
from stagewright.planner.schedules.sizes import check_placement, effort_of, sizes_of

OFFSETS = (1, 2, 1, 2)


def v_half(request: ScheduleRequest) -> Schedule:
    """Return the order of the half-memory block, at most (D + 2) // 2 activations on a rank."""
    return from_block(request, "v-half", OFFSETS)


def from_block(request: ScheduleRequest, name: str, offsets: tuple[int, int, int, int]) -> Schedule:
    """Return the repeated V block with the given offsets, improved for the costs under the block's own peak."""
    sizes = sizes_of(request, name, default_chunks=2, least_chunks=2, most_chunks=2)
    placement = wave_placement(sizes.num_ranks)
    check_placement(request, placement, name)
    chains = requested_chains(request, sizes, placement)
    blocks = v_blocks(sizes.num_ranks, offsets)
    cap = np.full(sizes.num_ranks, float(blocks[0].peak_chunks))
    words = best_of_blocks(chains, blocks, cap, Goal(1.0, 0.1), budget=effort_of(request, actions=3.2e7))
    return Schedule(name, sizes.num_microbatches, placement, orders_of(chains, words, 1))


FAMILY = ScheduleFamily(
    "v-half",
    "Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024",
    v_half,
    split_backward=True,
    default_chunks=2,
    improves=True,
    held_chunks=lambda num_ranks: block_peak(num_ranks, OFFSETS),
)
