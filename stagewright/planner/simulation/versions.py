"""How many versions of its weights a rank keeps, which the schedule's weight policy decides.

    flush, none, predict, elastic   1 in each replica
    stash (PipeDream)               one for each microbatch in flight on the stage: its backward uses the weights of its forward
    2bw                             2
    2gw (WPipe)                     2 on the first half of the stages, whose next forwards precede the backwards, 1 on the rest

Replicas (GEMS, Chimera, DualPipe, AvgPipe) are further copies of the same stages.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND, REPLICA, SLICE, STAGE, Schedule, WeightPolicy

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

_KEPT_BY_PREDICTORS = {"discrepancy": 1, "adam": 2}

_F, _B, _I = int(Kind.F), int(Kind.B), int(Kind.I)


def weight_versions(schedule: Schedule) -> Ints:
    """Return the versions of each stage's weights that its rank keeps, int32 [num_replicas, num_stages].

    Rows of the placement that share a rank (workers of PipeDream's stages) share its versions; the first one counts them.
    """
    versions = np.ones(schedule.placement.shape, dtype=np.int32)
    if schedule.weight_policy is WeightPolicy.DOUBLE_BUFFER:
        versions[:] = 2
    elif schedule.weight_policy is WeightPolicy.TWO_GROUP:
        versions[:, : schedule.num_stages // 2] = 2
    elif schedule.weight_policy is WeightPolicy.STASH:
        for rank, order in enumerate(schedule.orders):
            one = order.copy()
            one[:, REPLICA] = 0
            in_flight = _in_flight(one, 1, schedule.num_stages)[0]
            for stage in range(schedule.num_stages):
                rows = np.flatnonzero(schedule.placement[:, stage] == rank)
                versions[rows[:1], stage] = max(1, int(in_flight[stage]))
                versions[rows[1:], stage] = 0
    return versions


def versions_beside_the_master(schedule: Schedule) -> Ints:
    """Return the copies of each stage's weights beside the one that the optimizer steps, int32 [num_replicas, num_stages].

    The optimizer of a synchronous schedule steps the only copy. Where weights change under microbatches it steps a master,
    and the versions that forwards and backwards see are copies: those of `weight_versions`, and what moves in place is one.
    Predictors keep more: PipeMare's an average of the changes, XPipe's what the first microbatch of an update predicted for
    forwards, and what one predicted for backwards.
    """
    if schedule.is_synchronous:
        return np.zeros(schedule.placement.shape, dtype=np.int32)
    more = _KEPT_BY_PREDICTORS.get(str(schedule.parameters.get("predictor", "")), 0)
    return (weight_versions(schedule) + more).astype(np.int32)


def weight_copies(schedule: Schedule) -> Floats:
    """Return the weights on each rank in units of 1 / num_ranks of the model: replicas times versions, [num_ranks]."""
    copies = np.zeros(schedule.num_ranks)
    np.add.at(copies, schedule.placement.ravel(), weight_versions(schedule).ravel().astype(np.float64))
    return copies * schedule.num_ranks / schedule.num_stages


@njit(cache=True)
def _in_flight(order: Ints, num_replicas: int, num_stages: int) -> Ints:
    """Return the most microbatches of each stage between the start of F and the end of B or I, rounded up from slices."""
    live = np.zeros((num_replicas, num_stages))
    peak = np.zeros((num_replicas, num_stages), dtype=np.int32)
    num_slices = 1
    for index in range(len(order)):
        num_slices = max(num_slices, order[index, SLICE] + 1)
    for index in range(len(order)):
        kind, replica, stage = order[index, KIND], order[index, REPLICA], order[index, STAGE]
        amount = 1.0 if order[index, SLICE] < 0 else 1.0 / num_slices
        if kind == _F:
            live[replica, stage] += amount
            peak[replica, stage] = max(peak[replica, stage], int(np.ceil(live[replica, stage] - 1e-9)))
        elif kind in (_B, _I):
            live[replica, stage] -= amount
    return peak
