"""Layers of one pipeline rank with degrees of their own (Galvatron, Miao et al., VLDB 2022): stages behind each other on one rank.

A plan says so with several stages on one rank whose degrees differ, tp_k dp_k devices each, and an order in which a microbatch goes
forward through all of them and back before the next one. Between two stages a device's samples change. Replicas nest: device p is
in replica p // tp_k of stage k, with samples [d M / dp_k, (d + 1) M / dp_k) of the microbatch, so where dp grows by r a device keeps
a slice of what it has, and where dp falls it gathers what r devices have ("slice-gather"). Between blocks a device under sequence
parallelism has 1 / tp of each sequence: it joins the parts of the earlier stage's tensor-parallel group before, and keeps its part
for the later stage's after:

                  forward                                       backward
    sp before     an all-gather over the earlier tp devices     a slice
    dp grows      a slice of samples                            an all-gather over r devices at distance tp of the later stage
    dp falls      an all-gather over r devices at distance      a slice
                  tp of the earlier stage
    sp after      a slice                                       an all-gather over the later tp devices

each of the boundary tensor of the devices that have it whole, priced by the cost model's collectives; stages that differ in nothing
of this hand over what they have. No sum is needed: activations and their gradients are whole on each device of a tensor-parallel
group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stagewright.planner.cost.communication import collective_s, sent_bytes
from stagewright.planner.cost.groups import strided_group
from stagewright.planner.documents.cluster import NodeGroup
from stagewright.planner.documents.plan import Degrees, Plan, ScheduleSpec
from stagewright.planner.errors import InvalidDocument


@dataclass(frozen=True)
class Gather:
    """An all-gather: `num_members` devices at a distance of `stride` in the rank, each with `size_bytes` after it."""

    num_members: int
    stride: int
    size_bytes: float

    def seconds(self, group: NodeGroup) -> float:
        """Return how long it takes."""
        return collective_s("all-gather", self.size_bytes, strided_group(self.num_members, self.stride, group))

    @property
    def sent_bytes(self) -> float:
        """What one device sends."""
        return sent_bytes("all-gather", self.size_bytes, self.num_members)


def _real(gathers: Sequence[Gather]) -> list[Gather]:
    return [gather for gather in gathers if gather.num_members > 1]


@dataclass(frozen=True)
class Change:
    """A change of degrees between stage `stage` and the next one on its rank.

    Parameters
    ----------
    num_members : devices that gather samples from each other, 1 where replicas are as many; stride : their distance in the rank.
    grows : whether replicas become more, so that the backward gathers.
    joins, splits : devices of the earlier stage that hold parts of a sequence, and of the later one; 1 where each has it whole.
    """

    stage: int
    num_members: int
    stride: int
    grows: bool
    joins: int = 1
    splits: int = 1

    def gathers(self, size_bytes: float) -> tuple[list[Gather], list[Gather]]:
        """Return those of a forward and of a backward; `size_bytes` has the whole tensor of a device of the earlier stage."""
        after_bytes = size_bytes / self.num_members if self.grows else size_bytes * self.num_members
        samples = Gather(self.num_members, self.stride, max(size_bytes, after_bytes))
        forward, backward = [Gather(self.joins, 1, size_bytes)], [Gather(self.splits, 1, after_bytes)]
        (backward if self.grows else forward).append(samples)
        return _real(forward), _real(backward)


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
    """Whether all stages stand behind each other on one pipeline rank, with unlike degrees."""
    return plan.schedule.num_ranks == 1 and len({stage.degrees for stage in plan.stages}) > 1


def changes_of(plan: Plan, kinds: Sequence[str]) -> list[Change]:
    """Return the changes of degrees between neighbouring stages of one rank; `kinds` of all layers.

    Raises InvalidDocument where the replicas of neither stage divide those of the other.
    """
    placement = plan.schedule.placement[0]
    found = []
    for index, (first, second) in enumerate(pairwise(plan.stages)):
        if placement[index] == placement[index + 1] and first.degrees != second.degrees:
            layer = second.layer_indices[0]
            change = change_between(first.degrees, second.degrees, layer, kinds, stage=index)
            found += [] if change is None else [change]
    return found


def change_between(first: Degrees, second: Degrees, layer: int, kinds: Sequence[str], *, stage: int) -> Change | None:
    """Return the change in front of a layer, from the degrees of `stage` to those of the next; None where all stays as it is.

    Raises InvalidDocument where the replicas of neither divide those of the other.
    """
    blocks = [index for index, kind in enumerate(kinds) if kind == "block"]
    joins = first.tp if first.sp and blocks and blocks[0] < layer <= blocks[-1] + 1 else 1
    splits = second.tp if second.sp and blocks and blocks[0] < layer <= blocks[-1] + 1 else 1
    low, high = sorted((first, second), key=lambda degrees: degrees.dp)
    if high.dp % low.dp or low.tp % high.tp:
        raise InvalidDocument(
            f"stages {stage} and {stage + 1} have dp {first.dp} and {second.dp}, tp {first.tp} and {second.tp} on one rank; "
            "replicas of one must divide those of the other",
            field=f"stages[{stage + 1}].degrees",
            hint="take degrees that are multiples of each other",
        )
    if first.dp == second.dp and joins == splits:
        return None
    return Change(stage, high.dp // low.dp, high.tp, grows=second.dp > first.dp, joins=joins, splits=splits)
