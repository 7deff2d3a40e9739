"""Naive pipeline: one microbatch at a time, the stages run strictly in turn.

    rank 0  F0             B0 F1             B1
    rank 1     F0       B0       F1       B1
    rank 2        F0 B0             F1 B1

One rank works at any time: idle over total is (D - 1) / D for every T, and one activation is live. With T = 1 it is
GPipe with one microbatch. Paper: the baseline of every pipeline paper (inter-layer model parallelism).
"""

from __future__ import annotations

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, one_stage_passes
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import check_placement, sizes_of


def naive(request: ScheduleRequest) -> Schedule:
    """Return the order in which a microbatch leaves the pipeline before the next one enters."""
    sizes = sizes_of(request, "naive")
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "naive")
    orders = tuple(alternate(*one_stage_passes(rank, sizes.num_microbatches), 1) for rank in range(sizes.num_ranks))
    return Schedule("naive", sizes.num_microbatches, placement, orders)


FAMILY = ScheduleFamily("naive", "inter-layer model parallelism, the baseline of the pipeline papers", naive)
