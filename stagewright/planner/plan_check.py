"""What is wrong with a plan on a cluster: a list of violations, each with both numbers. Nothing is raised."""

from __future__ import annotations

from dataclasses import dataclass

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import StagewrightError
from stagewright.planner.prediction import evaluate
from stagewright.planner.replica_shares import samples_of_microbatch
from stagewright.planner.tightest_group import by_told_group

GIB = 2.0**30


@dataclass(frozen=True)
class PlanViolation:
    """One broken rule: a stable code, the plan's field (empty for the whole plan), the message and the way out."""

    code: str
    field: str
    message: str
    hint: str | None = None


def plan_violations(plan: Plan, profile: ModelProfile, cluster: Cluster | None = None) -> list[PlanViolation]:
    """Return the rules that a plan breaks when it trains this model on `cluster` (its own unless told).

    Of a cluster with too few devices nothing else is said: the ranks have no places there.
    """
    found: list[PlanViolation] = []
    if cluster is not None:
        plan = plan.model_copy(update={"cluster": cluster})
    ranks = plan.mapping.num_ranks
    if ranks > plan.cluster.num_devices:
        message = f"the plan has {ranks} ranks, cluster {plan.cluster.name} has {plan.cluster.num_devices} devices"
        return [PlanViolation("devices", "mapping.pipeline_ranks", message)]
    spec, shares = plan.schedule, plan.stages[0].batch_shares
    samples = spec.num_microbatches * samples_of_microbatch(plan)
    if samples != plan.job.global_batch:
        each = f"shares {list(shares)}" if shares else f"{spec.microbatch} samples x dp {plan.stages[0].degrees.dp}"
        message = f"{spec.num_microbatches} microbatches x {each} = {samples}, the job's global_batch is {plan.job.global_batch}"
        found.append(PlanViolation("batch", "schedule.num_microbatches", message))
    try:
        told = by_told_group(plan)
        peaks = [evaluate(one, profile).prediction.peak_memory_bytes for one in told]
    except StagewrightError as error:
        return [*found, PlanViolation(error.kind, "", error.message, error.hint)]
    headroom = plan.job.space.memory_headroom
    filled = [
        pair
        for one, row in zip(told, peaks, strict=True)
        for pair in enumerate(zip(row, memory_limits(one), strict=True))
    ]
    for rank, (peak, memory_bytes) in dict.fromkeys(filled):
        limit = memory_bytes * (1 - headroom)
        if peak > limit:
            message = (
                f"pipeline rank {rank} needs {peak / GIB:.2f} GiB, its device has {limit / GIB:.2f} GiB after "
                f"{headroom:.0%} headroom"
            )
            found.append(PlanViolation("memory", "stages", message))
    return found


def memory_limits(plan: Plan) -> list[float]:
    """Return the bytes that one device of each pipeline rank has, before headroom."""
    by_name = {group.name: group for group in plan.cluster.groups}
    limits = [plan.cluster.groups[0].device.memory_bytes] * plan.schedule.num_ranks
    for row in plan.schedule.placement:
        for stage, rank in zip(plan.stages, row, strict=True):
            if stage.group is not None and stage.group in by_name:
                limits[rank] = by_name[stage.group].device.memory_bytes
    return limits
