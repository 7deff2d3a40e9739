"""1F1B: rank d forwards D - d microbatches, then alternates one backward and one forward.

    rank 0  F0 F1 F2       B0 F3 B1 F4 B2    B3    B4
    rank 1     F0 F1    B0 F2 B1 F3 B2 F4 B3    B4
    rank 2        F0 B0 F1 B1 F2 B2 F3 B3 F4 B4

With equal stages the makespan is GPipe's, (T + D - 1) (F + B), and rank d holds min(T, D - d) activations instead of T.
PipeDream-Flush, DAPPLE's policy P_A and Megatron-LM's non-interleaved schedule are this order.

Papers: Fan et al., DAPPLE: A Pipelined Data Parallel Approach for Training Large Models, PPoPP 2021; Narayanan et al.,
Memory-Efficient Pipeline-Parallel DNN Training (PipeDream-Flush), ICML 2021.
"""

from __future__ import annotations

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, one_stage_passes
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import check_placement, sizes_of


def one_f_one_b(request: ScheduleRequest) -> Schedule:
    """Return the order with D - d warm-up forwards on rank d."""
    sizes = sizes_of(request, "1f1b")
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "1f1b")
    orders = tuple(
        alternate(*one_stage_passes(rank, sizes.num_microbatches), sizes.num_ranks - rank)
        for rank in range(sizes.num_ranks)
    )
    return Schedule("1f1b", sizes.num_microbatches, placement, orders)


FAMILY = ScheduleFamily(
    "1f1b",
    "Fan et al., DAPPLE: A Pipelined Data Parallel Approach for Training Large Models, PPoPP 2021",
    one_f_one_b,
    aliases=("dapple", "pipedream-flush"),
)
