"""How a microbatch lies over the replicas of each stage: equal parts, or the shares that a plan states.

Where ZeRO divides states, replicas may also hold unlike shares of them, in proportion to their memory and whatever their
samples are (Cephalo, Guo et al. 2024; Poplar, Zhang et al. 2024). Replicas of one stage may stand on devices of different speed and take samples in proportion (Metis' data balance,
Um et al., USENIX ATC 2024; Whale, Jia et al., ATC 2022). A microbatch has

    M = sum of the shares of stage 0,  or  microbatch * dp where they are equal

samples, and every stage shares out the same M over its own replicas, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.errors import InvalidDocument


@dataclass(frozen=True)
class ReplicaPart:
    """Replicas of one stage that follow each other on one node group and take equally many samples of a microbatch.

    Parameters
    ----------
    state_share : what each of them holds of the states that ZeRO divides; None where all replicas hold as much.
    """

    group: str
    num_replicas: int
    samples: int
    state_share: float | None = None


def samples_of_microbatch(plan: Plan) -> int:
    """Return the samples of a microbatch over all replicas of a stage."""
    first = plan.stages[0]
    return sum(first.batch_shares) if first.batch_shares else plan.schedule.microbatch * first.degrees.dp


def has_uneven_shares(plan: Plan) -> bool:
    """Whether some stage states shares of its own."""
    return any(stage.batch_shares or stage.state_shares for stage in plan.stages)


def samples_by_replica(plan: Plan, index: int) -> tuple[int, ...]:
    """Return the samples of a microbatch that each replica of a stage takes, [dp].

    Raises InvalidDocument when shares do not sum up to a microbatch, or dp does not divide it.
    """
    stage, whole = plan.stages[index], samples_of_microbatch(plan)
    dp, shares = stage.degrees.dp, stage.batch_shares
    if shares:
        if len(shares) != dp or sum(shares) != whole or min(shares) < 1:
            raise InvalidDocument(
                f"stages[{index}].batch_shares {list(shares)} are {len(shares)} shares of {sum(shares)} samples, the stage "
                f"has dp {dp} and a microbatch {whole} samples",
                field=f"stages[{index}].batch_shares",
                hint="give each replica at least one sample of the microbatch that stage 0 divides",
            )
        return shares
    if whole % dp:
        raise InvalidDocument(
            f"stages[{index}].degrees.dp {dp} does not divide a microbatch of {whole} samples",
            field=f"stages[{index}].degrees.dp",
            hint=f"stage 0 divides {whole} samples over dp {plan.stages[0].degrees.dp}; state batch_shares, or take a divisor",
        )
    return (whole // dp,) * dp


def parts_of_stage(plan: Plan, index: int) -> tuple[ReplicaPart, ...]:
    """Return the replicas of a stage in order, those of one group and one share together."""
    stage = plan.stages[index]
    shares = _state_shares(plan, index)
    if not (shares or stage.batch_shares or plan.cluster.is_mixed):
        return (ReplicaPart(plan.cluster.groups[0].name, stage.degrees.dp, samples_by_replica(plan, index)[0]),)
    held: tuple[float | None, ...] = shares or (None,) * stage.degrees.dp
    devices = plan.mapping.pipeline_ranks[plan.schedule.placement[0][index]]
    inner = stage.degrees.tp * stage.degrees.cp
    each = [
        (plan.cluster.group_of(devices[replica * inner]).name, samples, held[replica])
        for replica, samples in enumerate(samples_by_replica(plan, index))
    ]
    return tuple(ReplicaPart(group, len(list(run)), samples, share) for (group, samples, share), run in groupby(each))


def _state_shares(plan: Plan, index: int) -> tuple[float, ...]:
    """Return the stated shares of a stage's states; raises InvalidDocument unless they divide all of what ZeRO divides."""
    stage = plan.stages[index]
    shares = stage.state_shares
    if shares and (len(shares) != stage.degrees.dp or abs(sum(shares) - 1.0) > 1e-6 or not stage.degrees.zero):
        raise InvalidDocument(
            f"stages[{index}].state_shares are {len(shares)} shares of {sum(shares):.6g} together, the stage has dp "
            f"{stage.degrees.dp} and zero {stage.degrees.zero}",
            field=f"stages[{index}].state_shares",
            hint="give each replica a share, 1 together, with zero at least 1",
        )
    return shares


def shard_bounds(num_elements: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return where the shards of a flat buffer begin, and its end, [len(shares) + 1], given the share of each."""
    ends = [round(num_elements * min(end, 1.0)) for end in accumulate(shares)]
    return (0, *ends[:-1], num_elements)


def replica_of(degrees: Degrees, member: int) -> int:
    """Return which replica a device belongs to, given its place among those of its pipeline rank."""
    return min(member // (degrees.tp * degrees.cp), degrees.dp - 1)


def told_part(plan: Plan, index: int, member: int | None = None) -> ReplicaPart:
    """Return the part whose memory a prediction speaks of: a device's, or on the stage's group the one with most samples."""
    parts = parts_of_stage(plan, index)
    if member is not None:
        each = [part for part in parts for _ in range(part.num_replicas)]
        return each[replica_of(plan.stages[index].degrees, member)]
    name = plan.stages[index].group
    there = [part for part in parts if part.group == name] or list(parts)
    return max(there, key=lambda part: part.samples)
