"""Breadth-first pipeline: stage s on rank s mod D, all microbatches of a chunk before the next chunk, in both passes.

    rank 0  0F0 0F1 2F0 2F1         2B0 2B1 0B0 0B1
    rank 1      1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1

Idle over total is interleaving's, (D - 1) / (v T + D - 1) for T >= D, and every rank holds T activations. In return a
chunk's parameters are gathered twice and its gradients reduced once in an iteration, which divides the traffic of fully
sharded data parallelism by T against the depth-first order.

Paper: Lamy-Poirier, Breadth-First Pipeline Parallelism, MLSys 2023.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import order_of
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import check_placement, sizes_of


def breadth_first(request: ScheduleRequest) -> Schedule:
    """Return the order that runs all microbatches through a chunk before it takes the next chunk."""
    sizes = sizes_of(request, "breadth-first", default_chunks=2, most_chunks=None)
    placement = loop_placement(sizes.num_ranks, sizes.num_chunks)
    check_placement(request, placement, "breadth-first")
    unit = np.arange(sizes.num_microbatches * sizes.num_chunks, dtype=np.int32)
    chunk, microbatch = unit // sizes.num_microbatches, unit % sizes.num_microbatches
    orders = []
    for rank in range(sizes.num_ranks):
        forwards = order_of(int(Kind.F), chunk * sizes.num_ranks + rank, microbatch)
        last_first = sizes.num_chunks - 1 - chunk
        backwards = order_of(int(Kind.B), last_first * sizes.num_ranks + rank, microbatch)
        orders.append(np.concatenate([forwards, backwards]))
    return Schedule("breadth-first", sizes.num_microbatches, placement, tuple(orders))


FAMILY = ScheduleFamily(
    "breadth-first",
    "Lamy-Poirier, Breadth-First Pipeline Parallelism, MLSys 2023",
    breadth_first,
    aliases=("looped-bfs", "loopedbfs"),
    default_chunks=2,
)
