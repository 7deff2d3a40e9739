"""Interleaved zero bubble: the interleaved order with the backward split and the warm-up of ZB-H1.

Stage s is on rank s mod D. Units go through the chunks as in `interleaved`, but rank r forwards only
(v - 1) D + D - r of them before its first I, and its W are delayed as in ZB-H1, under a cap of D activations:

    rank 0  0F0 0F1 2F0 2F1     2I0 2W0 2I1 2W1 0I0 0W0 0I1 0W1
    rank 1      1F0 1F1 3F0 3I0 3F1 3I1 3W0 1I0 1W0 1I1 1W1 3W1

With equal times the bubble is (D - 1) / v of a forward, a third of interleaved 1F1B's, and the peak is D activations on
every rank, less than its D + (D - 1) / v. T must be a multiple of D, as for `interleaved`, with the same `parameters`.

Papers: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024; torch.distributed.pipelining's
ScheduleInterleavedZeroBubble.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.descent import Goal
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.interleaved import group_size, grouped_units
from stagewright.planner.schedules.list_scheduling import orders_of, requested_chains
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import check_placement, effort_of, sizes_of
from stagewright.planner.schedules.weight_placement import alternating_skeleton, place_by_cost


def interleaved_zb(request: ScheduleRequest) -> Schedule:
    """Return the interleaved order of F and I with the W placed by cost, at most D activations on a rank."""
    sizes = sizes_of(request, "interleaved-zb", default_chunks=2, least_chunks=2, most_chunks=None)
    ranks, chunks = sizes.num_ranks, sizes.num_chunks
    placement = loop_placement(ranks, chunks)
    check_placement(request, placement, "interleaved-zb")
    group = group_size(request, sizes, "interleaved-zb")
    chains = requested_chains(request, sizes, placement)
    chunk, _ = grouped_units(sizes.num_microbatches, chunks, group)
    rank = np.arange(ranks)
    warmups = (chunks - 1) * group + ranks - rank
    skeleton = alternating_skeleton(
        chunk * ranks + rank[:, None], (chunks - 1 - chunk) * ranks + rank[:, None], warmups, sizes.num_stages
    )
    cap = np.full(ranks, float((chunks - 1) * group + ranks))
    words = place_by_cost(chains, [skeleton], cap, Goal(1.0, 1.0), budget=effort_of(request))
    assert words is not None, "the W right after its I keeps the cap"
    return Schedule(
        "interleaved-zb",
        sizes.num_microbatches,
        placement,
        orders_of(chains, words, 1),
        parameters={"group": group},
    )


FAMILY = ScheduleFamily(
    "interleaved-zb",
    "Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024",
    interleaved_zb,
    aliases=("interleaved-zero-bubble", "interleavedzerobubble"),
    split_backward=True,
    default_chunks=2,
    constraint="T is a multiple of D, because a partial group leaves holes between the chunks",
    improves=True,
    fixed_order=True,
)
