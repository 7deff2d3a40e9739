"""V-Min: a V of two chunks on each rank whose repeating block holds the fewest activations, about a third of 1F1B's.

The block moves F0, F1, I1, I0 by one slot from rank to rank (`building_block`); a microbatch lives about 4 D slots on
every rank, so the peak is (D + 4) // 3 activations, the same everywhere. With F = I = W and T = 6 D the longest span has
a bubble of at most 2 D / (3 T). Costs that differ stall the dense block (with 10 / 12 / 8 and a latency of 1 it is worse
than 1F1B at D = 4, T = 8), so W, warm-up and cool-down are placed by cost, which keeps the peak.

With D = T = 3:

    rank 0  0F0 0F1 0F2         5F0 5I0 5W0 5F1 5I1 5W1 0I0 0W0         5F2 5I2 0I1 0W1 5W2     0I2 0W2
    rank 1      1F0 1F1     4F0     4F1 4I0 4W0 1F2 1I0 1W0 4I1 4W1 4F2     1I1 4I2 4W2 1W1 1I2 1W2
    rank 2          2F0 3F0 2F1 3F1         3I0 2I0 3W0 2W0 2F2 3F2 3I1 2I1 2W1 3W1 3I2 2I2 2W2 3W2

Paper: Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024.
"""

from __future__ import annotations

from stagewright.planner.schedules.building_block import block_peak
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.schedules.v_half import from_block

_OFFSETS = (1, 1, 1, 1)


def v_min(request: ScheduleRequest) -> Schedule:
    """Return the order of the least-memory block, at most (D + 4) // 3 activations on a rank."""
    return from_block(request, "v-min", _OFFSETS)


FAMILY = ScheduleFamily(
    "v-min",
    "Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024",
    v_min,
    split_backward=True,
    default_chunks=2,
    improves=True,
    held_chunks=lambda num_ranks: block_peak(num_ranks, _OFFSETS),
)
