"""AvgPipe: P pipelines over the same ranks, each with its own weights, drawn to their average.

Rank d holds stage d of every pipeline; microbatch m runs on pipeline m mod P, T microbatches in each. While one
pipeline waits, another computes. `parameters["pipelines"]` is P (2 unless told); `parameters["advance"]` forwards that
many more than 1F1B before the first backward (advance forward propagation), which moves the peak of a pipeline from
D - d towards T. After each minibatch x_i <- x_i - alpha (x_i - mean) (elastic averaging), so weights take P M.

Paper: Chen et al., Elastic Averaging for Efficient Pipelined DNN Training, PPoPP 2023.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import Ints, alternate, order_of
from stagewright.planner.schedules.schedule import Orders, Schedule, WeightPolicy
from stagewright.planner.schedules.sizes import check_placement, require, sizes_of

Floats = npt.NDArray[np.float64]


def avgpipe(request: ScheduleRequest) -> Schedule:
    """Return the P orders dealt in turn: one action of each pipeline after the other."""
    sizes = sizes_of(request, "avgpipe")
    pipelines = int(request.parameters.get("pipelines", 2))
    advance = int(request.parameters.get("advance", 0))
    require(pipelines >= 1, f"pipelines is {pipelines}, there is at least 1", field="pipelines")
    require(advance >= 0, f"advance is {advance}, it is at least 0", field="advance")
    placement = np.tile(np.arange(sizes.num_ranks, dtype=np.int32), (pipelines, 1))
    check_placement(request, placement, "avgpipe")
    orders = tuple(
        _dealt(
            [
                _pipeline(rank, sizes.num_ranks, sizes.num_microbatches, index, pipelines, advance)
                for index in range(pipelines)
            ]
        )
        for rank in range(sizes.num_ranks)
    )
    return Schedule(
        "avgpipe",
        sizes.num_microbatches * pipelines,
        placement,
        orders,
        weight_policy=WeightPolicy.ELASTIC,
        parameters={"pipelines": pipelines, "advance": advance},
    )


def _pipeline(rank: int, num_ranks: int, num_microbatches: int, index: int, pipelines: int, advance: int) -> Orders:
    microbatch: Ints = np.arange(num_microbatches, dtype=np.int32) * pipelines + index
    forwards = order_of(int(Kind.F), rank, microbatch, replica=index)
    backwards = order_of(int(Kind.B), rank, microbatch, replica=index)
    return alternate(forwards, backwards, num_ranks - rank + advance)


def _dealt(orders: list[Orders]) -> Orders:
    return np.stack(orders, axis=1).reshape(-1, orders[0].shape[1])


def elastic_step(weights: Floats, rate: float) -> Floats:
    """Return the weights of the P pipelines, shape [P, ...], after one step towards their average (EASGD)."""
    centre: Floats = weights.mean(axis=0, keepdims=True)
    return weights - rate * (weights - centre)


FAMILY = ScheduleFamily(
    "avgpipe",
    "Chen et al., Elastic Averaging for Efficient Pipelined DNN Training, PPoPP 2023",
    avgpipe,
    synchronous=False,
    num_replicas=2,
    weight_policy=WeightPolicy.ELASTIC,
)
