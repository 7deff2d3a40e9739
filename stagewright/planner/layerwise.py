"""Layers of one pipeline rank with degrees of their own (Galvatron, Miao et al., VLDB 2022): stages behind each other on one rank.

A plan says so with several stages on one rank whose degrees differ, tp_k dp_k devices each, and an order in which a microbatch goes
forward through all of them and back before the next one. Between two stages a device's samples change. Replicas nest: device p is
in replica p // tp_k of stage k, with samples [d M / dp_k, (d + 1) M / dp_k) of the microbatch, so where dp grows by r a device keeps
a slice of what it has, and where dp falls it gathers what r devices have ("slice-gather"):

    dp grows    forward a slice     backward an all-gather of the gradient over r devices at distance tp of the later stage
    dp falls    forward an all-gather over r devices at distance tp of the earlier one    backward a slice

so either way one all-gather of the boundary tensor of the side with more samples a device, priced by the cost model's
collectives. No sum is needed: activations and their gradients are whole on each device of a tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from stagewright.planner.cost.communication import collective_s, sent_bytes
from stagewright.planner.cost.groups import strided_group
from stagewright.planner.documents.cluster import NodeGroup
from stagewright.planner.documents.plan import Degrees, Plan, ScheduleSpec
from stagewright.planner.errors import InvalidDocument


@dataclass(frozen=True)
class Change:
    """A change of degrees between stage `stage` and the next one on its rank.

    Parameters
    ----------
    num_members : devices that gather from each other; stride : their distance in the rank.
    grows : whether replicas become more, so that the backward gathers.
    """

    stage: int
    num_members: int
    stride: int
    grows: bool

    def seconds(self, size_bytes: float, group: NodeGroup) -> float:
        """Return the seconds of the gather, `size_bytes` what a device has after it."""
        return collective_s("all-gather", size_bytes, strided_group(self.num_members, self.stride, group))

    def sent(self, size_bytes: float) -> float:
        """Return the bytes that one device sends."""
        return sent_bytes("all-gather", size_bytes, self.num_members)


def layerwise_order(num_stages: int, num_microbatches: int) -> tuple[str, ...]:
    """Return the order of one rank that takes each microbatch through all stages and back."""
    return tuple(
        f"{stage}{kind}{microbatch}"
        for microbatch in range(num_microbatches)
        for kind, stages in (("F", range(num_stages)), ("B", reversed(range(num_stages))))
        for stage in stages
    )


def layerwise_schedule(num_stages: int, num_microbatches: int, microbatch: int) -> ScheduleSpec:
    """Return the schedule of stages behind each other on one rank; `microbatch` are the samples of a replica of stage 0."""
    return ScheduleSpec(
        name="custom",
        num_ranks=1,
        num_microbatches=num_microbatches,
        microbatch=microbatch,
        num_chunks=num_stages,
        placement=((0,) * num_stages,),
        orders=(layerwise_order(num_stages, num_microbatches),),
    )


def is_layerwise(plan: Plan) -> bool:
    """Whether all stages stand behind each other on one rank, each microbatch through all of them and back, with unlike degrees."""
    spec = plan.schedule
    order = layerwise_order(len(plan.stages), spec.num_microbatches)
    return spec.num_ranks == 1 and spec.orders == (order,) and len({stage.degrees for stage in plan.stages}) > 1


def changes_of(plan: Plan) -> list[Change]:
    """Return the changes of degrees between neighbouring stages of one rank.

    Raises InvalidDocument where the replicas of neither stage divide those of the other.
    """
    placement = plan.schedule.placement[0]
    found = []
    for index, (first, second) in enumerate(pairwise(plan.stages)):
        if placement[index] != placement[index + 1] or first.degrees.dp == second.degrees.dp:
            continue
        low, high = sorted((first.degrees, second.degrees), key=lambda degrees: degrees.dp)
        if high.dp % low.dp or low.tp % high.tp:
            raise InvalidDocument(
                f"stages {index} and {index + 1} have dp {first.degrees.dp} and {second.degrees.dp}, tp {first.degrees.tp} and "
                f"{second.degrees.tp} on one rank; replicas of one must divide those of the other",
                field=f"stages[{index + 1}].degrees",
                hint="take degrees that are multiples of each other",
            )
        found.append(Change(index, high.dp // low.dp, high.tp, grows=second.degrees.dp > first.degrees.dp))
    return found


def fewer_replicas(plan: Plan, change: Change) -> int:
    """Return the stage of a change whose devices have more samples each."""
    return change.stage if change.grows else change.stage + 1


def replica_of(place: int, degrees: Degrees) -> int:
    """Return which replica of a stage a device of the rank belongs to."""
    return place // (degrees.tp * degrees.cp)
