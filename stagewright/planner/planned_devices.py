"""The devices that a plan runs on: by node group, by pipeline rank and by kind, with their peak and their price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stagewright.planner.documents.cluster import Cluster, Device, NodeGroup
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile


def group_of(cluster: Cluster, name: str | None) -> NodeGroup:
    """Return a node group by name, the first one for None."""
    return next((group for group in cluster.groups if group.name == name), cluster.groups[0])


def device_of(cluster: Cluster, group: str | None) -> Device:
    """Return the device of a node group, the first one for None."""
    return group_of(cluster, group).device


def rank_devices(plan: Plan) -> list[Device]:
    """Return the device of each pipeline rank, by the group of the stages it holds."""
    found = [plan.cluster.groups[0].device] * plan.schedule.num_ranks
    for row in plan.schedule.placement:
        for stage, rank in zip(plan.stages, row, strict=True):
            found[rank] = device_of(plan.cluster, stage.group)
    return found


def base_bytes(profile: ModelProfile, device: Device) -> float:
    """Return what framework and driver hold before the first tensor, bytes."""
    return profile.framework_bytes + device.reserved_bytes


def peak_flops(plan: Plan) -> float:
    """Return the dense peak of all devices of the plan at the job's dtype, FLOP per second."""
    total = 0.0
    for rank, devices in enumerate(plan.mapping.pipeline_ranks):
        stage = plan.schedule.placement[0].index(rank) if rank in plan.schedule.placement[0] else 0
        kinds = [(device_of(plan.cluster, plan.stages[stage].group), len(devices))]
        if plan.stages[stage].batch_shares or plan.stages[stage].state_shares:
            kinds = _kinds(plan.cluster, devices)
        total += sum(count * (kind.flops.get(plan.job.precision) or max(kind.flops.values())) for kind, count in kinds)
    return total


def price_per_s(plan: Plan) -> float | None:
    """Return dollars per second of the devices used; None when a device has no price."""
    total = 0.0
    for kind, count in _kinds(plan.cluster, [device for ranks in plan.mapping.pipeline_ranks for device in ranks]):
        if kind.price_per_hour is None:
            return None
        total += count * kind.price_per_hour / 3600.0
    return total or None


def _kinds(cluster: Cluster, devices: Sequence[int]) -> list[tuple[Device, int]]:
    """Return the kinds of some devices with their numbers."""
    ends = np.cumsum([group.num_devices for group in cluster.groups])
    counts = np.bincount(np.searchsorted(ends, devices, side="right"), minlength=len(ends))
    return [(group.device, count) for group, count in zip(cluster.groups, counts.tolist(), strict=True) if count]
