"""V-Half with the output layer cut over all ranks: half of 1F1B's activations, and no rank that the vocabulary makes late.

The 2 D blocks stand as a V, blocks d and 2 D - 1 - d on rank d, so that the last block is on rank 0. Its output goes to all ranks, and
the passes S and T of the vocabulary with their barriers are those of `vocabulary`:

    stage d < 2 D    block d, a chain          stage 3 D    the barrier, on rank 0; after all parts
    stage 2 D + d    part d of the vocabulary on rank d: F is S, the backward is T; after block 2 D - 1

A block has as many microbatches in flight as in V-Half's repeating block (`v_half`), each waits one round longer for each barrier: at most
(D + 2) // 2 + 2 activations on a rank with algorithm 1, + 1 with algorithm 2, where 1F1B with the vocabulary holds D + 2 and
D + 1. Backwards of blocks are split. A greedy list scheduler (`stage_graph_lists`) places the passes in the order of each of a few rules;
the fastest order that keeps the limit wins. One rule runs every W at once and takes nobody ahead of V-Half's block: it holds
(D + 2) // 2 where blocks hold alike, so there always is one. With D = 2 and T = 2, algorithm 1 and equal stages:

    rank 0  0F0 0F1 3F0 4F0 6F0 6B0 4B0 3I0 3F1 4F1 6F1 6B1 0I0 4B1 3I1 0W0 3W0 0I1 0W1 3W1
    rank 1  1F0 1F1 2F0 2F1 5F0 5B0 2I0 5F1 1I0 1W0 2W0 5B1 2I1 1I1 1W1 2W1

`parameters`: algorithm, 1 (default) or 2. A memory cap replaces the limit. Costs are those of the 3 D + 1 stages.

Paper: Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism, MLSys 2025 (V-Half, Vocab-1 and Vocab-2); the order is
made by our list scheduler, not by the paper's building block.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.building_block import PERIOD, v_blocks
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.schedules.schedule import Schedule, wave_placement
from stagewright.planner.schedules.sizes import check_parts, check_placement, require
from stagewright.planner.schedules.stage_graph_lists import GraphRule, order_by
from stagewright.planner.schedules.v_half import OFFSETS
from stagewright.planner.schedules.vocabulary import BARRIERS, as_long_as_a_block, vocabulary_edges

# Priorities of F, I and W of a block and of T, the lower first; S always is first, since every rank waits for it.
_AT_ONCE = (3.0, 2.0, 1.0, 0.5)
_PRIORITIES = ((2.0, 3.0, 1.0, 0.5), (2.0, 1.0, 3.0, 2.5), (1.0, 2.0, 3.0, 0.5), (2.0, 1.0, 3.0, 0.5))


def v_half_vocabulary(request: ScheduleRequest) -> Schedule:
    """Return V-Half's blocks with the passes of the vocabulary between them."""
    ranks, count = request.num_ranks, request.num_microbatches
    algorithm = int(request.parameters.get("algorithm", 1))
    require(algorithm in BARRIERS, f"algorithm is {algorithm}, there are 1 and 2", field="parameters")
    blocks, stages = 2 * ranks, 3 * ranks + 1
    check_parts(
        request,
        "v-half-vocab",
        chunks=(2, "blocks"),
        stages=(stages, f"{blocks} blocks, {ranks} parts of the vocabulary and the barrier"),
    )
    row = np.concatenate((wave_placement(ranks)[0], np.arange(ranks), [0])).astype(np.int32)
    check_placement(request, row[None, :], "v-half-vocab")
    costs = request.costs or StageCosts.uniform(stages)
    edges = vocabulary_edges(blocks, ranks)
    best: tuple[float, float, Schedule] | None = None
    for rule in _rules(ranks, count, algorithm):
        orders, makespan_s = order_by(row, edges, costs, count, request.latency_s, rule)
        schedule = Schedule(
            "v-half-vocab", count, row[None, :], orders, edges=edges, parameters={"algorithm": algorithm}
        )
        value = _excess(schedule, costs, request.memory_cap, algorithm), makespan_s
        if best is None or (value[0], value[1] * (1.0 + 1e-12)) < best[:2]:
            best = *value, schedule
    assert best is not None, "there is at least one rule"
    return best[2]


def as_long_as_a_chunk(blocks: StageCosts) -> StageCosts:
    """Return the costs of the 3 D + 1 stages of 2 D blocks when the output layer is as long as the mean one and keeps nothing."""
    return as_long_as_a_block(blocks, num_parts=blocks.num_stages // 2)


def _excess(schedule: Schedule, costs: StageCosts, memory_cap: float | None, algorithm: int) -> float:
    """Return by how much the order exceeds the cap, or without one the chunks of V-Half's block and of the barriers."""
    if memory_cap is not None:
        over = float(peak_activations(schedule, costs).max()) - memory_cap
        return over if over > 1e-9 * memory_cap else 0.0
    blocks = 2 * schedule.num_ranks
    one_each = replace(
        costs,
        activation=np.where(np.arange(costs.num_stages) < blocks, 0.5, 0.0),
        freed_at_input_grad=np.zeros(costs.num_stages),
    )
    most = (schedule.num_ranks + 2) // 2 + BARRIERS[algorithm]
    return max(0.0, float(peak_activations(schedule, one_each).max()) - most)


def _rules(ranks: int, count: int, algorithm: int) -> list[GraphRule]:
    """Return the rules to try, the one that holds least first."""
    blocks, stages = 2 * ranks, 3 * ranks + 1
    slots = v_blocks(ranks, OFFSETS)[0].slots
    to_input_grad, to_weight_grad = (
        -(-(slots[kind] + 1 - slots[0]) // PERIOD) for kind in (1, 2)
    )  # from the start of F
    is_block = np.arange(stages) < blocks
    is_part = ~is_block & (np.arange(stages) < 3 * ranks)
    rules = []
    for ahead in range(2):
        for priorities in (_AT_ONCE, *_PRIORITIES) if ahead == 0 else _PRIORITIES:
            forward, input_grad, weight_grad, late = priorities
            priority = np.zeros((len(Kind), stages))
            priority[Kind.F, is_block], priority[Kind.I, is_block] = forward, input_grad
            priority[Kind.W, is_block], priority[Kind.B, is_part] = weight_grad, late
            priority[Kind.W, is_part] = 4.0
            most_ahead = np.full(stages, count, dtype=np.int32)
            most_ahead[:blocks] = to_input_grad if priorities is _AT_ONCE else to_weight_grad + ahead
            rules.append(GraphRule(priority, most_ahead, is_block | (is_part & (algorithm == 2))))
    return rules


FAMILY = ScheduleFamily(
    "v-half-vocab",
    "Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism, MLSys 2025",
    v_half_vocabulary,
    split_backward=True,
    default_chunks=2,
    takes_cap=True,
    plain=False,
    not_run="its stages are parts of the output layer and a barrier between them, which no model is cut into",
    expanded_costs=as_long_as_a_chunk,
)
