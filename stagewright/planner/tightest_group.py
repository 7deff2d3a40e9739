"""Which node group a plan's memory speaks of, where replicas of a stage stand on several.

A prediction holds one peak for each pipeline rank. Replicas on different devices hold different shares of a microbatch
against different memories, so a stage names the group whose devices are filled most, and the others are less full.
"""

from __future__ import annotations

from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.prediction import evaluate
from stagewright.planner.replica_shares import has_uneven_shares, parts_of_stage


def by_told_group(plan: Plan) -> list[Plan]:
    """Return the plan once for each place among a stage's groups, so that the peaks of all groups can be told."""
    if not has_uneven_shares(plan):
        return [plan]
    names = [
        list(dict.fromkeys(part.group for part in parts_of_stage(plan, index)))
        if stage.batch_shares or stage.state_shares
        else [stage.group]
        for index, stage in enumerate(plan.stages)
    ]
    return [
        plan.model_copy(
            update={
                "stages": tuple(
                    stage.model_copy(update={"group": row[min(place, len(row) - 1)]})
                    for stage, row in zip(plan.stages, names, strict=True)
                )
            }
        )
        for place in range(max(len(row) for row in names))
    ]


def with_tightest_groups(plan: Plan, profile: ModelProfile) -> Plan:
    """Return the plan whose stages name the group whose devices they fill most; the plan itself on groups alone."""
    told = by_told_group(plan)
    if len(told) == 1:
        return plan
    sizes = {group.name: group.device.memory_bytes for group in plan.cluster.groups}
    peaks = [evaluate(one, profile).prediction.peak_memory_bytes for one in told]
    stages = []
    for index, rank in enumerate(plan.schedule.placement[0]):
        filled = [
            (peak[rank] / sizes[str(one.stages[index].group)], -place)
            for place, (one, peak) in enumerate(zip(told, peaks, strict=True))
        ]
        stages.append(told[-max(filled)[1]].stages[index])
    return plan.model_copy(update={"stages": tuple(stages)})
