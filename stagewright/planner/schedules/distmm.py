"""DistMM: branches of a multimodal model side by side, in front of a loss that needs the features of the whole batch.

A contrastive loss compares every sample with every other one, so no backward may start before the last forward: the
pipeline is split at the loss. Stages form a graph, one a rank; a rank forwards all microbatches, and then runs their
backwards. Two towers of one stage each and the loss behind them (edges 0-2, 1-2):

    rank 0  F0 F1 F2 F3             B0 B1 B2 B3
    rank 1  F0 F1 F2 F3             B0 B1 B2 B3
    rank 2     F0 F1 F2 F3 B0 B1 B2 B3

The loss itself is computed at the head of the first backward of the last rank, behind all its forwards. With no backward
to take, any rank's order is this one but for the numbers of microbatches, so under such a loss none is faster. With equal
stages and depth d of the graph, idle over total is (d - 1) / (T + d - 1), and a rank holds T activations. On a chain of
stages it is GPipe.

Paper: Huang et al., DistMM: Accelerating Distributed Multimodal Model Training, NSDI 2024. Degrees that differ by branch
are the plan's (`per_stage_degrees`).
"""

from __future__ import annotations

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.graphpipe import graph_order, path_lengths, stage_graph_of
from stagewright.planner.schedules.schedule import Schedule


def distmm(request: ScheduleRequest) -> Schedule:
    """Return one stage on each rank, all forwards before the first backward."""
    edges, placement = stage_graph_of(request, "distmm")
    path_lengths(request.num_ranks, edges)  # refuses cycles and unknown stages
    return graph_order(request, "distmm", edges, placement, [request.num_microbatches] * request.num_ranks)


FAMILY = ScheduleFamily(
    "distmm",
    "Huang et al., DistMM: Accelerating Distributed Multimodal Model Training, NSDI 2024",
    distmm,
)
