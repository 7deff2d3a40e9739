"""1F1B with the output layer cut over all ranks, so that the vocabulary does not make the last rank late.

A vocabulary of V columns is cut into D parts, one on each rank. For every microbatch the last block's output goes to all ranks,
each computes its part of the logits (pass S), a barrier joins maximum and sum of the softmax, each computes its part of the
gradients (pass T), and their sum starts the backward of the last block. The passes are stages of a graph with 2 D + 1 stages:

    stage d          block d on rank d, a chain
    stage D + d      part d of the vocabulary on rank d: F is S, the backward is T; after block D - 1
    stage 2 D        the barrier, on the last rank; after all parts

Algorithm 1 has two barriers and T is one full backward. In algorithm 2 S computes the input gradients too, before they are
scaled, so I only takes the joint factor and the weight gradient W waits as long as it likes. Rank d has at most D - d + 2 or D - d + 1
microbatches in flight (one for each barrier beside 1F1B's D - d), and a greedy list scheduler (`stage_graph_lists`) places the
passes by the costs: S before all else, since every rank waits for it, and then in the best of a few orders. With D = 2 and T = 3, algorithm
1 and equal stages:

    rank 0  0F0 0F1 2F0 0F2 2B0 2F1 2F2 2B1 2B2 0B0 0B1 0B2
    rank 1  1F0 3F0 4F0 4B0 1F1 3F1 1F2 3F2 4F1 4F2 4B1 4B2 3B0 1B0 3B1 1B1 3B2 1B2

`parameters`: algorithm, 1 (default) or 2. Costs are those of the 2 D + 1 stages; the barrier's are its all-reduce.

Paper: Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism, MLSys 2025 (1F1B, Vocab-1 and Vocab-2).
"""

from __future__ import annotations

import itertools

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.schedules.sizes import check_parts, check_placement, require
from stagewright.planner.schedules.stage_graph_lists import GraphRule, greedy_orders

BARRIERS = {1: 2, 2: 1}  # by algorithm


def vocabulary_1f1b(request: ScheduleRequest) -> Schedule:
    """Return blocks in 1F1B with the passes of the vocabulary between them."""
    ranks, count = request.num_ranks, request.num_microbatches
    algorithm = int(request.parameters.get("algorithm", 1))
    require(algorithm in BARRIERS, f"algorithm is {algorithm}, there are 1 and 2", field="parameters")
    stages = 2 * ranks + 1
    check_parts(
        request,
        "1f1b-vocab",
        chunks=(1, "block"),
        stages=(stages, f"{ranks} blocks, {ranks} parts of the vocabulary and the barrier"),
    )
    placement = np.concatenate((np.arange(ranks), np.arange(ranks), [ranks - 1])).astype(np.int32)[None, :]
    check_placement(request, placement, "1f1b-vocab")
    costs = request.costs or StageCosts.uniform(stages)
    edges = vocabulary_edges(ranks, ranks)
    orders = greedy_orders(placement[0], edges, costs, count, request.latency_s, _rules(ranks, count, algorithm))
    return Schedule("1f1b-vocab", count, placement, orders, edges=edges, parameters={"algorithm": algorithm})


def vocabulary_edges(num_blocks: int, num_parts: int) -> tuple[tuple[int, int], ...]:
    """Return the stage graph: the blocks' chain, the last block to every part, every part to the barrier."""
    parts = range(num_blocks, num_blocks + num_parts)
    return (
        *((stage, stage + 1) for stage in range(num_blocks - 1)),
        *((num_blocks - 1, part) for part in parts),
        *((part, num_blocks + num_parts) for part in parts),
    )


def vocabulary_costs(
    blocks: StageCosts,
    vocabulary: StageCosts,
    barrier_s: float,
    *,
    algorithm: int = 1,
    num_parts: int | None = None,
) -> StageCosts:
    """Return the costs of blocks, parts and barrier: an output layer (one stage, whole) is cut into equal parts, one a block unless told.

    `barrier_s` is the time of one all-reduce, which also is the least time of a pass.
    """
    ranks = blocks.num_stages if num_parts is None else num_parts
    require(
        vocabulary.num_stages == 1, f"the vocabulary has {vocabulary.num_stages} stages, it is 1", field="vocabulary"
    )
    forward_s, input_s, weight_s = (
        float(values[0]) / ranks for values in (vocabulary.forward_s, vocabulary.input_grad_s, vocabulary.weight_grad_s)
    )
    if algorithm == 2:
        forward_s, input_s = forward_s + input_s, barrier_s

    def joined(values: np.ndarray, part: float, barrier: float) -> np.ndarray:
        return np.concatenate((values, np.full(ranks, part), [barrier]))

    half_s = 0.5 * barrier_s
    return StageCosts.of(
        joined(blocks.forward_s, forward_s, barrier_s),
        joined(blocks.input_grad_s, input_s, half_s),
        joined(blocks.weight_grad_s, weight_s, half_s),
        activation=joined(blocks.activation, float(vocabulary.activation[0]) / ranks, 0.0),
    )


def as_long_as_a_block(blocks: StageCosts, *, num_parts: int | None = None) -> StageCosts:
    """Return the costs of blocks, parts and barrier when the output layer is as long as the mean block and keeps nothing."""
    means = ([float(values.mean())] for values in (blocks.forward_s, blocks.input_grad_s, blocks.weight_grad_s))
    layer, barrier_s = StageCosts.of(*means, activation=[0.0]), 1e-3 * float(blocks.forward_s.min())
    return vocabulary_costs(blocks, layer, barrier_s, num_parts=num_parts)


def _rules(ranks: int, count: int, algorithm: int) -> list[GraphRule]:
    """Return the priorities to try: S first, the others in every order."""
    stages = 2 * ranks + 1
    blocks, parts = np.arange(stages) < ranks, (np.arange(stages) >= ranks) & (np.arange(stages) < 2 * ranks)
    most_ahead = np.full(stages, count, dtype=np.int32)
    most_ahead[:ranks] = ranks - np.arange(ranks) + BARRIERS[algorithm]
    rules = []
    for order in itertools.permutations((1.0, 2.0, 3.0)):
        priority = np.zeros((len(Kind), stages))
        priority[Kind.B, blocks], priority[Kind.F, blocks], late = order
        priority[Kind.B, parts] = priority[Kind.W, parts] = late
        rules.append(GraphRule(priority, most_ahead, parts & (algorithm == 2)))
    return rules


FAMILY = ScheduleFamily(
    "1f1b-vocab",
    "Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism, MLSys 2025",
    vocabulary_1f1b,
    aliases=("vocab", "vocabulary-parallel"),
    plain=False,
    not_run="its stages are parts of the output layer and a barrier between them, which no model is cut into",
    expanded_costs=as_long_as_a_block,
)
