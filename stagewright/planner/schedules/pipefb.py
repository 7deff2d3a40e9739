"""PipeFB: the forward and the backward of a stage on different ranks, so that activations leave the ranks that make them.

Rank d runs the forwards of stage d and the backwards of stage D - 1 - d, whose activations it gets from rank D - 1 - d. Both
waves then run from rank 0 to rank D - 1, so the last forward of a microbatch is followed at once by its first backward on rank 0.
In the schedule each stage is two: s runs the forward, D + s the backward, with the edges

    s -> s + 1      outputs              s -> D + s      the activation moves to the backward's rank
    D + s -> D + s + 1    gradients, on their way back

The F of D + s receives the activation and the B of s says that it is no longer needed; both take (next to) no time.

A rank runs receipts and releases at once, then backwards and forwards, whichever order is faster, with D to D + 2 microbatches ahead
of their backwards (`stage_graph_lists`). With D = 2, T = 3 (stages 2 and 3 are the backwards of 0 and 1):

    rank 0  0F0 0F1 0F2 3F0 3F1 3F2 3B0 3B1 3B2 0B0 0B1 0B2
    rank 1  2F0 2F1 2F2 1F0 1F1 1F2 1B0 1B1 1B2 2B0 2B1 2B2

With equal stages and T = D the makespan is T (F + B) + (D - 1) B, 1F1B's less (D - 1) F; for larger T it lies between the two.
Weights of a stage stand on both of its ranks.

Paper: PipeFB as told by the survey "Advances of Pipeline Model Parallelism for Deep Learning Training", section on memory;
the placement above is derived from its one sentence, not from the paper.
"""

from __future__ import annotations

import itertools

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.schedules.sizes import check_parts, check_placement
from stagewright.planner.schedules.stage_graph_lists import GraphRule, greedy_orders

NEXT_TO_NOTHING = 1e-6


def pipefb(request: ScheduleRequest) -> Schedule:
    """Return the order in which a stage's forwards run on one rank and its backwards on another."""
    ranks, count = request.num_ranks, request.num_microbatches
    check_parts(
        request,
        "pipefb",
        chunks=(2, "half stages, a forward and a backward,"),
        stages=(2 * ranks, f"{ranks} forwards and {ranks} backwards (see pipefb.halved)"),
    )
    rank = np.arange(ranks, dtype=np.int32)
    placement = np.concatenate((rank, rank[::-1]))[None, :]
    check_placement(request, placement, "pipefb")
    chains = [(stage, stage + 1) for stage in range(2 * ranks - 1) if stage != ranks - 1]
    edges = tuple(sorted([*chains, *((stage, ranks + stage) for stage in range(ranks))]))
    costs = request.costs or StageCosts.uniform(2 * ranks, num_chunks=2)
    orders = greedy_orders(placement[0], edges, costs, count, request.latency_s, _rules(ranks))
    return Schedule("pipefb", count, placement, orders, edges=edges)


def halved(costs: StageCosts, *, receive_s: float | None = None) -> StageCosts:
    """Return the costs of the 2 D half stages of D stages; a receipt takes `receive_s`, and so does a release.

    Without it they take a millionth of the shortest forward.
    """
    ranks = costs.num_stages
    short = np.full(ranks, NEXT_TO_NOTHING * float(costs.forward_s.min()) if receive_s is None else receive_s)
    return StageCosts.of(
        np.concatenate((costs.forward_s, short)),
        np.concatenate((short / 2, costs.input_grad_s)),
        np.concatenate((short / 2, costs.weight_grad_s)),
        activation=np.concatenate((np.zeros(ranks), costs.activation)),
        freed_at_input_grad=np.concatenate((np.zeros(ranks), costs.freed_at_input_grad)),
        recompute_s=np.concatenate((np.zeros(ranks), costs.recompute_s)),
    )


def _rules(ranks: int) -> list[GraphRule]:
    """Return receipts and releases first, then backwards and forwards in either order, with few microbatches in flight first."""
    forwards = np.arange(2 * ranks) < ranks
    rules = []
    for ahead, (backward, forward) in itertools.product(range(ranks, ranks + 3), ((1.0, 2.0), (2.0, 1.0))):
        priority = np.zeros((len(Kind), 2 * ranks))
        priority[Kind.B, ~forwards], priority[Kind.F, forwards] = backward, forward
        most_ahead = np.full(2 * ranks, ahead, dtype=np.int32)
        rules.append(GraphRule(priority, most_ahead, np.zeros(2 * ranks, dtype=np.bool_)))
    return rules


FAMILY = ScheduleFamily(
    "pipefb",
    "PipeFB, after the survey Advances of Pipeline Model Parallelism for Deep Learning Training",
    pipefb,
    plain=False,
    not_run="a stage's backward runs on another rank than its forward, which autograd's graph does not leave",
    expanded_costs=halved,
)
