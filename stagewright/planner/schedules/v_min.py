"""V-Min: a V of two chunks on each rank whose repeating block holds the fewest activations, about a third of 1F1B's.

The block moves F0, F1, I1, I0 by one slot from rank to rank (`building_block`); a microbatch lives about 4 D slots on
every rank, so the peak is (D + 4) // 3 activations, the same everywhere. With F = I = W and T = 6 D the longest span has
a bubble of at most 2 D / (3 T). Costs that differ stall the dense block (with 10 / 12 / 8 and a latency of 1 it is worse
than 1F1B at D = 4, T = 8), so W, warm-up and cool-down are placed by cost, which keeps the peak.

Paper: Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024.
"""

from __future__ import annotations

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
)
