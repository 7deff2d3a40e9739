"""XPipe: microbatches of several minibatches share the pipeline, on weights predicted with Adam's own direction.

A minibatch is T microbatches. Its first microbatch, the bellwether, predicts the weights once for the forward and once
for the backward of the whole minibatch, so there are 2 predictions where a prediction for each microbatch would make
2 T. The order is 1F1B without a flush over `parameters["updates"]` minibatches; the weights are one copy.

Paper: Guan et al., XPipe: Efficient Pipeline Model Parallelism for Multi-GPU DNN Training, 2019.
"""

from __future__ import annotations

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.pipedream import endless_1f1b
from stagewright.planner.schedules.pipedream_2bw import num_updates
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy

PREDICTIONS_PER_MINIBATCH = 2


def xpipe(request: ScheduleRequest) -> Schedule:
    """Return `updates` minibatches (1 unless told) of T microbatches each."""
    updates = num_updates(request)
    parameters: dict[str, int | float | str] = {
        "predictor": "adam",
        "updates": updates,
        "update_every": request.num_microbatches,
    }
    return endless_1f1b(request, "xpipe", WeightPolicy.PREDICT, parameters, num_periods=updates)


def version_difference(rank: int, num_ranks: int, num_microbatches: int, *, backward: bool) -> int:
    """Return how many updates ahead the bellwether predicts: those applied before its minibatch's own on this rank.

    Between a microbatch's forward on rank d and its backward there, D - d - 1 others finish; they hold
    ceil((D - d - 1) / T) updates. The backward sees the newest weights.
    """
    return 0 if backward else -(-(num_ranks - rank - 1) // num_microbatches)


FAMILY = ScheduleFamily(
    "xpipe",
    "Guan et al., XPipe: Efficient Pipeline Model Parallelism for Multi-GPU DNN Training, 2019",
    xpipe,
    synchronous=False,
    weight_policy=WeightPolicy.PREDICT,
)
