"""DAPPLE with policy P_B: rank d forwards K_d = min(2 (D - d) - 1, M) microbatches before its first backward.

DAPPLE starts backwards early and then alternates strictly. Policy P_A, K_d = min(D - d, M), is 1F1B. P_B keeps almost
twice as many microbatches in flight, so that a hop between ranks as long as a fraction of the compute is hidden: with
D = 3, T = 7 and a hop as long as an action,

    rank 0  F0 F1 F2 F3 F4             B0 F5 B1 F6 B2    B3    B4    B5    B6
    rank 1        F0 F1 F2       B0 F3 B1 F4 B2 F5 B3 F6 B4    B5    B6
    rank 2              F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6

M is the number of microbatches the memory cap admits on the rank, all T without a cap. Rank d holds min(K_d, T).

Paper: Fan et al., DAPPLE: A Pipelined Data Parallel Approach for Training Large Models, PPoPP 2021, section 3.3.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, one_stage_passes
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import check_placement, costs_of, sizes_of


def dapple_pb(request: ScheduleRequest) -> Schedule:
    """Return the early-backward order with the longer warm-up of policy P_B, within the memory cap."""
    sizes = sizes_of(request, "dapple-pb")
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "dapple-pb")
    warmups = 2 * np.arange(sizes.num_ranks, 0, -1) - 1
    if request.memory_cap is not None:
        fitting = request.memory_cap / np.maximum(costs_of(request, sizes).activation, 1e-300) + 1e-9
        # A rank that forwards more than the one before it would wait for it forever.
        warmups = np.minimum.accumulate(np.minimum(warmups, fitting)).astype(np.int64)
    orders = tuple(
        alternate(*one_stage_passes(rank, sizes.num_microbatches), int(warmup)) for rank, warmup in enumerate(warmups)
    )
    return Schedule("dapple-pb", sizes.num_microbatches, placement, orders)


FAMILY = ScheduleFamily(
    "dapple-pb",
    "Fan et al., DAPPLE: A Pipelined Data Parallel Approach for Training Large Models, PPoPP 2021, policy P_B",
    dapple_pb,
    takes_cap=True,
)
