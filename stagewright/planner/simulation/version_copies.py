"""What weights that change under microbatches cost beside the computation: memory that is read and written again.

Everything is counted in copies of a stage's weights. A copy reads a tensor, and writes another one which the caches read in
before: 3 passes over its bytes. With one pass for each tensor that is read, one for each that is written and one more for
each that is written and not read,

    a + b into b, in place      3 passes   1 copy         a scaled, in place    2 passes   2/3
    a + b into another tensor   4          4/3            zeros                 2          2/3

Let T be the microbatches of an update. A run then does, more or less than a synchronous one,

    each update     a new version of the weights (1), but gradients that are dropped instead of set to zero (-2/3);
                    PipeMare notes the weights before (1) and averages the change (2) instead of making a version,
                    SpecTrain and XPipe make none; AvgPipe's P pipelines find their mean (1 + (P - 1) + 2/3, shared)
                    and move to it (1)
    each backward   no sum with the gradients before it, for the first of T: -2/3 / T. To be added, a gradient is written
                    where one was just read (1), read (1) and summed in place (2); else it stays where it is written (2)
    each forward and backward under prediction
                    SpecTrain    weights moved along the velocity (4/3), or as they are (1) where s = 0
                    XPipe        a copy of what the first of T predicted (1); predicting it 4, or 1 where s = 0
                    PipeMare     a copy (1) for the forward, moved back along the average (4/3) for the backward

The policies are those of `runtime.weight_versions` and `runtime.predicted_weights`, papers there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules import spectrain, xpipe
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy

Floats = npt.NDArray[np.float64]

_COPY, _SUM_IN_PLACE, _SUM, _SCALING, _ZEROS, _ADDED = 1.0, 1.0, 4 / 3, 2 / 3, 2 / 3, 2 / 3
_ADAM_DIRECTION = _COPY + 2 * _SCALING + 5 / 3  # corrected second moment, its root, eps; then w + a m / that, 5 passes


@dataclass(frozen=True, eq=False)
class VersionCopies:
    """Copies of a stage's weights, float64 [num_stages] each.

    Parameters
    ----------
    forward, backward : for each microbatch, under prediction.
    accumulation : of each backward, what it is spared; at most 0.
    update : for each update of one pipeline; zeroing that a synchronous update has is taken off.
    pipelines : updates at the end of the order where each pipeline has weights of its own; 1 otherwise.
    """

    forward: Floats
    backward: Floats
    accumulation: Floats
    update: Floats
    pipelines: int = 1


def version_copies(schedule: Schedule) -> VersionCopies | None:
    """Return what the schedule's weight policy costs; None where an order flushes before each update."""
    if schedule.is_synchronous:
        return None
    count, policy = schedule.num_stages, schedule.weight_policy
    pipelines = schedule.num_replicas if policy is WeightPolicy.ELASTIC else 1
    every = _microbatches_of_an_update(schedule, pipelines)
    forward, backward = np.zeros(count), np.zeros(count)
    update = np.full(count, _COPY)
    predictor = str(schedule.parameters.get("predictor", ""))
    if policy is WeightPolicy.PREDICT:
        update[:] = 0.0
        if predictor == "momentum":
            forward, backward = (_moved(schedule, way) for way in (False, True))
        elif predictor == "adam":
            forward, backward = (_COPY + _predicted(schedule, every, way) / every for way in (False, True))
        else:
            forward[:], backward[:] = _COPY, _SUM
            update[:] = _COPY + 2 * _SUM_IN_PLACE
    if policy is WeightPolicy.ELASTIC:
        update += (_COPY + (pipelines - 1) * _SUM_IN_PLACE + _SCALING) / pipelines + _SUM_IN_PLACE
    return VersionCopies(forward, backward, np.full(count, -_ADDED / every), update - _ZEROS, pipelines)


def _microbatches_of_an_update(schedule: Schedule, pipelines: int) -> int:
    told = schedule.parameters.get("update_every")
    if told is not None:
        return int(told)
    return max(schedule.num_microbatches // pipelines, 1) if schedule.weight_policy is WeightPolicy.ELASTIC else 1


def _moved(schedule: Schedule, backward: bool) -> Floats:
    count = schedule.num_stages
    steps = [spectrain.version_difference(stage, count, backward=backward) for stage in range(count)]
    return np.array([_SUM if step else _COPY for step in steps])


def _predicted(schedule: Schedule, every: int, backward: bool) -> Floats:
    count = schedule.num_stages
    steps = [xpipe.version_difference(stage, count, every, backward=backward) for stage in range(count)]
    return np.array([_ADAM_DIRECTION if step else _COPY for step in steps])
