"""WPipe: the model in two groups of stages, updated alternately; the next period's forward precedes this one's backward.

Rank d holds stage d (group 1) and stage D + d (group 2). With f, b on group 1 and F, B on group 2, in period k

    f(k) ... | F(k), B(k) in 1F1B | f(k + 1), b(k) in 1F1B | F(k + 1), B(k + 1) ...

Group 2's backward follows its forward within the period and uses its newest weights; only group 1 runs ahead of its
own update and keeps two versions: 1.5 M on average where 2BW keeps 2 M, and half of its stale gradients.

Paper: Yang et al., Group-based Interleaved Pipeline Parallelism for Large-scale DNN Training, ICLR 2022.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, order_of
from stagewright.planner.schedules.pipedream_2bw import RULE, num_updates
from stagewright.planner.schedules.schedule import Orders, Schedule, WeightPolicy, loop_placement
from stagewright.planner.schedules.sizes import check_placement, require, sizes_of


def wpipe(request: ScheduleRequest) -> Schedule:
    """Return `updates` periods (1 unless told) of T microbatches each."""
    sizes = sizes_of(request, "wpipe", default_chunks=2, least_chunks=2, most_chunks=2)
    ranks, period = sizes.num_ranks, sizes.num_microbatches
    require(
        period >= ranks,
        f"wpipe updates each group after at least D = {ranks} microbatches, {period} were asked for",
        field="num_microbatches",
    )
    placement = loop_placement(ranks, 2)
    check_placement(request, placement, "wpipe")
    updates = num_updates(request)
    orders = tuple(_order(rank, ranks, period, updates) for rank in range(ranks))
    parameters = {"updates": updates, "update_every": period}
    return Schedule(
        "wpipe", period * updates, placement, orders, weight_policy=WeightPolicy.TWO_GROUP, parameters=parameters
    )


def _order(rank: int, num_ranks: int, period: int, updates: int) -> Orders:
    def rows(kind: Kind, stage: int, k: int) -> Orders:
        return order_of(int(kind), stage, np.arange(k * period, (k + 1) * period, dtype=np.int32))

    front, back = rank, num_ranks + rank
    parts = [rows(Kind.F, front, 0)]
    for k in range(updates):
        parts.append(alternate(rows(Kind.F, back, k), rows(Kind.B, back, k), num_ranks - rank))
        backward = rows(Kind.B, front, k)
        parts.append(alternate(rows(Kind.F, front, k + 1), backward, num_ranks - rank) if k + 1 < updates else backward)
    return np.concatenate(parts)


FAMILY = ScheduleFamily(
    "wpipe",
    "Yang et al., Group-based Interleaved Pipeline Parallelism for Large-scale DNN Training, ICLR 2022",
    wpipe,
    aliases=("2gw",),
    synchronous=False,
    default_chunks=2,
    weight_policy=WeightPolicy.TWO_GROUP,
    constraint=RULE,
)
