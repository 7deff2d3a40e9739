"""GEMS: two replicas of the model in opposite directions, one live activation on each rank.

Replica 0 runs stage s on rank s, replica 1 on rank D - 1 - s. The forward of the next microbatch, on the other replica,
follows the backward of the one before through the ranks, so each rank alternates F and B and holds one activation
(`1:` marks replica 1):

    rank 0  0F0                           0B0   1:2F1 1:2B1 0F2                           0B2
    rank 1        1F0               1B0   1:1F1             1:1B1 1F2               1B2
    rank 2              2F0   2B0   1:0F1                         1:0B1 2F2   2B2

In the steady state the idle share tends to (D - 1) / (D + 1/2) for B = 2 F and to (D - 1) / (D + 1) for B = F; both
replicas hold all weights and reduce their gradients together.

Paper: Jain et al., GEMS: GPU-Enabled Memory-Aware Model-Parallelism System for Distributed DNN Training, SC 2020.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, order_of
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.schedules.sizes import Placement, check_placement, sizes_of


def gems(request: ScheduleRequest) -> Schedule:
    """Return the order that alternates the two replicas, one microbatch at a time on each rank."""
    sizes = sizes_of(request, "gems")
    placement = opposite_placement(sizes.num_ranks)
    check_placement(request, placement, "gems")
    microbatch = np.arange(sizes.num_microbatches, dtype=np.int32)
    replica = microbatch % 2
    orders = []
    for rank in range(sizes.num_ranks):
        stage = np.where(replica == 0, rank, sizes.num_ranks - 1 - rank)
        forwards = order_of(int(Kind.F), stage, microbatch, replica=replica)
        backwards = order_of(int(Kind.B), stage, microbatch, replica=replica)
        orders.append(alternate(forwards, backwards, 1))
    return Schedule("gems", sizes.num_microbatches, placement, tuple(orders))


def opposite_placement(num_ranks: int) -> Placement:
    """Return the placement of two replicas in opposite directions, shape [2, D]."""
    down = np.arange(num_ranks, dtype=np.int32)
    return np.stack([down, down[::-1]])


FAMILY = ScheduleFamily(
    "gems",
    "Jain et al., GEMS: GPU-Enabled Memory-Aware Model-Parallelism System for Distributed DNN Training, SC 2020",
    gems,
    num_replicas=2,
)
