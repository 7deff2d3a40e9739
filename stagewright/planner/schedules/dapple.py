"""DAPPLE with policy P_B: rank d forwards K_d = min(2 (D - d) - 1, M) microbatches before its first backward.

DAPPLE starts backwards early and then alternates strictly. Policy P_A, K_d = min(D - d, M), is 1F1B. P_B keeps almost
twice as many microbatches in flight, so that a hop between ranks as long as a fraction of the compute is hidden: with
D = 3 and one free slot for each hop,

    rank 0  F0 F1 F2 F3 F4                   B0 F5 ...
    rank 1        F0 F1 F2 F3       B0 F4 ...
    rank 2              F0 B0 F1 B1 F2 B2 ...

M is the number of microbatches the memory cap admits on the rank, all T without a cap. Rank d holds min(K_d, T).

Paper: Fan et al., DAPPLE: A Pipelined Data Parallel Approach for Training Large Models, PPoPP 2021, section 3.3.
"""

from __future__ import annotations

import math

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, one_stage_passes
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import check_placement, costs_of, sizes_of


def dapple_pb(request: ScheduleRequest) -> Schedule:
    """Return the early-backward order with the longer warm-up of policy P_B, within the memory cap."""
    sizes = sizes_of(request, "dapple-pb")
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "dapple-pb")
    activation = costs_of(request, sizes).activation
    orders = []
    for rank in range(sizes.num_ranks):
        warmup = 2 * (sizes.num_ranks - rank) - 1
        if request.memory_cap is not None and activation[rank] > 0:
            warmup = min(warmup, math.floor(request.memory_cap / activation[rank] + 1e-9))
        orders.append(alternate(*one_stage_passes(rank, sizes.num_microbatches), warmup))
    return Schedule("dapple-pb", sizes.num_microbatches, placement, tuple(orders))


FAMILY = ScheduleFamily(
    "dapple-pb",
    "Fan et al., DAPPLE: A Pipelined Data Parallel Approach for Training Large Models, PPoPP 2021, policy P_B",
    dapple_pb,
)
