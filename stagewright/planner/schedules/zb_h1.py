"""ZB-H1: 1F1B with the backward split, weight gradients delayed so that every rank holds D activations.

Rank d forwards D - d microbatches and then alternates I and F as 1F1B does; its first d W wait until the cap of D
activations forces them, so the last rank sends gradients up without stopping for W:

    rank 0  F0 F1 F2       I0 W0 F3 I1 W1 I2 W2 I3 W3
    rank 1     F0 F1    I0 W0 F2 I1 F3 I2 W1 I3 W2 W3
    rank 2        F0 I0 W0 F1 I1 F2 I2 F3 I3 W1 W2 W3

The bubble is (D - 1) (F + I - W) for T >= D, a third of 1F1B's with equal times: makespan 3 T + D - 1 for
F = I = W = 1. No rank holds more than min(T, D) activations, the peak of 1F1B's first rank. The places of the W follow
the costs and the latency (`weight_placement`); the order of F and I is fixed.

Paper: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 2.2.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.descent import Goal
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.list_scheduling import Chains, Ints, Words, orders_of, requested_chains
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import Sizes, check_placement, effort_of, sizes_of
from stagewright.planner.schedules.weight_placement import alternating_skeleton, place_by_cost


def zb_h1(request: ScheduleRequest) -> Schedule:
    """Return 1F1B's order of F and I with the W placed by cost, at most D activations on a rank."""
    sizes = sizes_of(request, "zb-h1")
    return one_chunk(request, sizes, "zb-h1", sizes.num_ranks - np.arange(sizes.num_ranks), sizes.num_ranks)


def one_chunk(request: ScheduleRequest, sizes: Sizes, name: str, warmups: Ints, cap: int) -> Schedule:
    """Return the split order with these warm-up forwards on the ranks and at most `cap` activations on each."""
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, name)
    chains, words = one_chunk_words(request, sizes, warmups, cap)
    return Schedule(name, sizes.num_microbatches, placement, orders_of(chains, words, 1))


def one_chunk_words(request: ScheduleRequest, sizes: Sizes, warmups: Ints, cap: int) -> tuple[Chains, Words]:
    """Return the words of `one_chunk` and the chains they are over, where every activation counts 1."""
    chains = requested_chains(request, sizes, loop_placement(sizes.num_ranks))
    stage = np.arange(sizes.num_ranks)[:, None].repeat(sizes.num_microbatches, axis=1)
    words = place_by_cost(
        chains,
        [alternating_skeleton(stage, stage, warmups, sizes.num_stages)],
        np.full(sizes.num_ranks, float(cap)),
        Goal(1.0, 1.0),
        budget=effort_of(request),
    )
    assert words is not None, "the W right after its I keeps the cap"
    return chains, words


FAMILY = ScheduleFamily(
    "zb-h1",
    "Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024",
    zb_h1,
    split_backward=True,
    improves=True,
    fixed_order=True,
)
