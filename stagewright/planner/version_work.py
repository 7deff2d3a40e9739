"""The seconds that weight versions take of a pipeline: `simulation.version_copies` at the rate of a copy.

With P the bytes of a stage's weights, c the copies that a forward, a backward or an update makes and r the bytes copied in
a second, each takes c P / r longer. r is measured by the profile (`ModelProfile.copy_bytes_per_s`), else half of the
device's memory bandwidth, since a copy reads and writes. Each update of an order pays for a step of its own, which a
synchronous one pays once: r and what a step takes beside its parameters are all that is known of an update beside the
optimizer's own seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.cluster import Device
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.schedules.lowering.gradients import update_period
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.search.order import Layout
from stagewright.planner.search.pipeline_costs import PipelineCosts
from stagewright.planner.simulation.version_copies import version_copies

Floats = npt.NDArray[np.float64]


def with_version_work(
    pipeline: PipelineCosts,
    schedule: Schedule,
    layout: Layout,
    profile: ModelProfile,
    parameter_bytes: Floats,
    devices: Sequence[Device],
) -> PipelineCosts:
    """Return the costs with those of the schedule's weight policy; as they are for a schedule that flushes.

    `parameter_bytes` and `devices` are those of each stage, [S]. What a backward is spared, since it has no gradients to add
    to, is known of a measured backward only, which adds.
    """
    copies = version_copies(schedule)
    if copies is None:
        return pipeline
    rate = np.array([profile.copy_bytes_per_s or device.memory_bytes_per_s / 2 for device in devices])
    copy_s = parameter_bytes / rate
    costs = pipeline.costs.copy()
    costs[0] += copies.forward * copy_s
    costs[1] += copies.backward * copy_s
    if profile.copy_bytes_per_s is not None:
        costs[2] = np.maximum(costs[2] + copies.accumulation * copy_s, 0.0)
    update_s = np.maximum(pipeline.optimizer_s + copies.update * copy_s, 0.0)
    if update_period(schedule):
        update_s += profile.step_overhead_s
    longer_s = update_s * copies.pipelines - pipeline.optimizer_s
    held = [sorted({slot.stage for slot in slots}) for slots in layout.slots]
    tail_s = pipeline.tail_s + np.array([longer_s[stages].sum() for stages in held])
    return replace(pipeline, costs=costs, optimizer_s=update_s * copies.pipelines, tail_s=tail_s)
