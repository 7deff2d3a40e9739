"""GPipe: all forwards, then all backwards, then one update.

    rank 0  F0 F1 F2 F3             B0 B1 B2 B3
    rank 1     F0 F1 F2 F3       B0 B1 B2 B3
    rank 2        F0 F1 F2 F3 B0 B1 B2 B3

Makespan = sum of (F + B) + (T - 1) (max F + max B); with equal stages idle over total is (D - 1) / (T + D - 1) for any
ratio of B to F. Every rank holds T activations; with recomputation, T boundary tensors and one activation. Backwards
run in the order of the forwards: the paper draws them reversed, which changes no start time of equal stages, and this
order gives gradients that sum as a single process sums them.

Paper: Huang et al., GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism, NeurIPS 2019.
"""

from __future__ import annotations

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, one_stage_passes
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import check_placement, sizes_of


def gpipe(request: ScheduleRequest) -> Schedule:
    """Return the order with all forwards of a rank before its first backward."""
    sizes = sizes_of(request, "gpipe")
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "gpipe")
    microbatches = sizes.num_microbatches
    orders = tuple(alternate(*one_stage_passes(rank, microbatches), microbatches) for rank in range(sizes.num_ranks))
    return Schedule("gpipe", microbatches, placement, orders)


FAMILY = ScheduleFamily(
    "gpipe",
    "Huang et al., GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism, NeurIPS 2019",
    gpipe,
)
