"""Interleaved 1F1B: v chunks on each rank, stage s on rank s mod D, microbatches in groups of D.

A rank runs the microbatches of one group through chunk 0, then through chunk 1, and so on, then the next group;
backwards take the chunks in reverse. With D = T = 2, v = 2 (stages 0 and 2 on rank 0, stages 1 and 3 on rank 1):

    rank 0  0F0 0F1 2F0 2F1     2B0     2B1 0B0 0B1
    rank 1      1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1

Rank r forwards 2 (D - r - 1) + (v - 1) D + 1 units before its first backward. With equal costs idle over ideal is
(D - 1) / (v T), so idle over total is (D - 1) / (v T + D - 1); rank 0 holds min(T, D + (D - 1) / v) activations.
T must be a multiple of D: a partial group would leave holes between the chunks. `parameters`:

- group: microbatches in a group (Megatron-LM's microbatch_group_size_per_vp_stage), at least D and a divisor of T;
- variant = "torch": torch's Interleaved1F1B and PTD-P's successors take T / max(1, T // D) as the group, so T may be any
  multiple of max(1, T // D). Where T is a multiple of D the two are the same order.

Paper: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import Ints, alternate, order_of
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import Sizes, check_placement, require, sizes_of


def interleaved(request: ScheduleRequest) -> Schedule:
    """Return the depth-first order over chunks, groups of D microbatches at a time."""
    sizes = sizes_of(request, "interleaved", default_chunks=2, least_chunks=2, most_chunks=None)
    placement = loop_placement(sizes.num_ranks, sizes.num_chunks)
    check_placement(request, placement, "interleaved")
    group = group_size(request, sizes, "interleaved")
    chunk, microbatch = grouped_units(sizes.num_microbatches, sizes.num_chunks, group)
    orders = []
    for rank in range(sizes.num_ranks):
        forwards = order_of(int(Kind.F), chunk * sizes.num_ranks + rank, microbatch)
        last_first = sizes.num_chunks - 1 - chunk
        backwards = order_of(int(Kind.B), last_first * sizes.num_ranks + rank, microbatch)
        warmup = 2 * (sizes.num_ranks - rank - 1) + (sizes.num_chunks - 1) * group + 1
        orders.append(alternate(forwards, backwards, warmup))
    return Schedule("interleaved", sizes.num_microbatches, placement, tuple(orders), parameters={"group": group})


def group_size(request: ScheduleRequest, sizes: Sizes, name: str) -> int:
    """Return the microbatches of one group; raises InvalidArgument with the rule when T does not divide."""
    ranks, microbatches = sizes.num_ranks, sizes.num_microbatches
    if request.parameters.get("variant") == "torch":
        rounds = max(1, microbatches // ranks)
        require(
            microbatches % rounds == 0,
            f"{name} in torch's variant needs microbatches that divide into max(1, T // D) = {rounds} rounds, "
            f"{microbatches} do not",
            field="num_microbatches",
        )
        return microbatches // rounds
    group = int(request.parameters.get("group", ranks))
    require(group >= ranks, f"a group of {group} microbatches is less than {ranks} ranks", field="group")
    require(
        microbatches % group == 0,
        f"{name} needs a multiple of {group} microbatches ({ranks} ranks), {microbatches} is not",
        field="num_microbatches",
        hint=f"take {max(group, microbatches // group * group)} or {(microbatches // group + 1) * group} microbatches",
    )
    return group


def grouped_units(num_microbatches: int, num_chunks: int, group: int) -> tuple[Ints, Ints]:
    """Return chunk and microbatch of each unit: group after group, in a group chunk after chunk."""
    unit = np.arange(num_microbatches * num_chunks, dtype=np.int32)
    within = unit % (group * num_chunks)
    return within // group, unit // (group * num_chunks) * group + within % group


FAMILY = ScheduleFamily(
    "interleaved",
    "Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021",
    interleaved,
    aliases=("interleaved-1f1b", "interleaved1f1b", "vpp"),
    default_chunks=2,
    constraint="T is a multiple of D, because a partial group leaves holes between the chunks",
)
