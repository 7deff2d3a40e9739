"""SpecTrain: 1F1B without a flush on predicted weights, one copy of them.

Before a forward or backward the weights are moved along the momentum to where they will be when the minibatch's update
comes, s updates later: w(t + s) = w(t) - s eta v(t - 1). On GPU k of N (both from 0)

    s = floor(k / 2) + N - k - 1   before the forward,      s = floor(k / 2)   before the backward.

The order is PipeDream's; only the weight policy differs (`weight_prediction.momentum_step`).

Paper: Chen et al., Efficient and Robust Parallel DNN Training through Model Parallelism on Multi-GPU Platform, 2018.
"""

from __future__ import annotations

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.pipedream import endless_1f1b
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy


def spectrain(request: ScheduleRequest) -> Schedule:
    """Return T minibatches of the endless order."""
    return endless_1f1b(request, "spectrain", WeightPolicy.PREDICT, {"predictor": "momentum", "update_every": 1})


def version_difference(rank: int, num_ranks: int, *, backward: bool) -> int:
    """Return s, how many updates ahead the weights are predicted on a rank."""
    return rank // 2 if backward else rank // 2 + num_ranks - rank - 1


FAMILY = ScheduleFamily(
    "spectrain",
    "Chen et al., Efficient and Robust Parallel DNN Training through Model Parallelism on Multi-GPU Platform, 2018",
    spectrain,
    synchronous=False,
    weight_policy=WeightPolicy.PREDICT,
)
