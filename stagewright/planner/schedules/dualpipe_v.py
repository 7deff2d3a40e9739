"""DualPipeV: DualPipe folded in a V, so that D ranks hold one copy of 2 D stages ("cut in half").

Rank d holds stages d and 2 D - 1 - d. The order is that of DualPipe's rank d on 2 D ranks, with the down pass as one
direction and the up pass as the other; see `dualpipe` for its eight phases. Idle time of a rank is, in seconds of one
chunk, (D - 1) (F&B + F_B - 3 W) with fused pairs and (D - 1) (F + I - W) with separate actions; a rank holds D + 1/2
activations and the parameters of two chunks, half of DualPipe's. The pairs are
separate actions unless `parameters["fused"] = 1`: without a table of overlapped durations, fusing only delays results.

With D = 2, T = 4:

    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1     3F2 0B0     3B2     3F3     0B1     3B3     0I2 0W2 0I3 0W3
    rank 1      1F0 2F0 1F1 2F1 1F2 2B0     2F2 1B0     1F3 2B1     2F3 1B1     2B2     1B2     2I3 1I3 2W3 1W3

Papers: Qi et al., "Cut-in-half", Sea AI Lab, 2025; DeepSeek-AI, DualPipe, 2025.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.dualpipe import two_way_steps
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import order_of
from stagewright.planner.schedules.schedule import FUSED, Schedule, wave_placement
from stagewright.planner.schedules.sizes import check_placement, require, sizes_of


def dualpipe_v(request: ScheduleRequest) -> Schedule:
    """Return the V-folded DualPipe order."""
    sizes = sizes_of(request, "dualpipe-v", default_chunks=2, least_chunks=2, most_chunks=2)
    ranks, microbatches = sizes.num_ranks, sizes.num_microbatches
    require(
        microbatches >= 2 * ranks,
        f"dualpipe-v fills both directions with at least 2 D = {2 * ranks} microbatches for {ranks} ranks, "
        f"{microbatches} were asked for",
        field="num_microbatches",
    )
    placement = wave_placement(ranks)
    check_placement(request, placement, "dualpipe-v")
    fused = bool(request.parameters.get("fused", 0))
    orders = []
    for rank in range(ranks):
        steps = two_way_steps(rank, ranks, microbatches, fused=fused)
        stage = np.where(steps.direction == 0, rank, 2 * ranks - 1 - rank).astype(np.int32)
        order = order_of(steps.kind, stage, steps.microbatch)
        order[:, FUSED] = steps.fused
        orders.append(order)
    return Schedule("dualpipe-v", microbatches, placement, tuple(orders), parameters={"fused": int(fused)})


FAMILY = ScheduleFamily(
    "dualpipe-v",
    "DeepSeek-AI, DualPipe, 2025; Qi et al., Cut-in-half, Sea AI Lab, 2025",
    dualpipe_v,
    aliases=("dualpipev",),
    split_backward=True,
    default_chunks=2,
    constraint="T is at least 2 D, which fills both directions",
)
