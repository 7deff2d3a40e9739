"""TeraPipe: a microbatch is cut along its sequence into K slices, which follow each other through the stages.

A causal model lets slice j start when the slices before it are done on the same stage. With D = 2, T = 1, K = 3:

    rank 0  F0.0 F0.1 F0.2           B0.2 B0.1 B0.0
    rank 1       F0.0 F0.1 F0.2 B0.2 B0.1 B0.0

All forwards come before all backwards; the backward of a microbatch takes its slices in reverse, because the gradients
of keys and values of a slice sum over all later ones. With equal slices idle over total is (D - 1) / (K T + D - 1), and
every rank holds T activations.

Paper: Li et al., TeraPipe: Token-Level Pipeline Parallelism for Training Large-Scale Language Models, ICML 2021.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, order_of
from stagewright.planner.schedules.schedule import Orders, Schedule, loop_placement
from stagewright.planner.schedules.sizes import check_placement, sizes_of


def terapipe(request: ScheduleRequest) -> Schedule:
    """Return the order with the forwards of all slices before the backwards of all slices."""
    sizes = sizes_of(request, "terapipe", sliced=True)
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "terapipe")
    units = sizes.num_microbatches * sizes.num_slices
    orders = tuple(
        alternate(*sliced_passes(rank, sizes.num_microbatches, sizes.num_slices), units)
        for rank in range(sizes.num_ranks)
    )
    return Schedule("terapipe", sizes.num_microbatches, placement, orders, num_slices=sizes.num_slices)


def sliced_passes(stage: int, num_microbatches: int, num_slices: int) -> tuple[Orders, Orders]:
    """Return forwards and full backwards of one stage over (microbatch, slice); backwards take slices in reverse."""
    unit = np.arange(num_microbatches * num_slices, dtype=np.int32)
    microbatch, position = unit // num_slices, unit % num_slices
    if num_slices == 1:
        return order_of(int(Kind.F), stage, microbatch), order_of(int(Kind.B), stage, microbatch)
    return (
        order_of(int(Kind.F), stage, microbatch, slice_index=position),
        order_of(int(Kind.B), stage, microbatch, slice_index=num_slices - 1 - position),
    )


FAMILY = ScheduleFamily(
    "terapipe",
    "Li et al., TeraPipe: Token-Level Pipeline Parallelism for Training Large-Scale Language Models, ICML 2021",
    terapipe,
)
