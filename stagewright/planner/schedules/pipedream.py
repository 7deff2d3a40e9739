"""PipeDream: 1F1B that never flushes; the backward of a minibatch uses the weights its forward used (weight stashing).

    rank 0  F0 F1 F2 B0 F3 B1 F4 B2 ...      3 versions
    rank 1     F0 F1 B0 F2 B1 F3 ...         2 versions
    rank 2        F0 B0 F1 B1 ...            1 version

Each minibatch ends with an update of its stage, so rank d keeps up to D - d versions of its weights. Idle over total
is (D - 1) / (T + D - 1) for T minibatches and vanishes as training goes on. The trajectory is the delayed one,
w(t + 1) = w(t) - v grad f(w_1(t - D + 1), ..., w_D(t)), not that of synchronous training.

Stages may have workers of their own: `parameters["replicas"]` is r_0,...,r_{S-1} (2,1 for instance), on r_0 + ... ranks. Minibatch
m goes to worker m mod r_s of each stage s (round robin), which runs 1F1B on its own minibatches with

    ceil((r_s + ... + r_{S-1}) / r_s)     of them in flight; of the input stage's that is NOAM.

The workers of a stage sum the gradients of one minibatch each and take one step on their mean, so that every r_s
minibatches make an update. In the placement a row is a class of minibatches with one way through the workers: there are
lcm(r_0, ..., r_{S-1}) of them, and rows share ranks.

Paper: Narayanan et al., PipeDream: Generalized Pipeline Parallelism for DNN Training, SOSP 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, one_stage_passes, order_of
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy, loop_placement
from stagewright.planner.schedules.sizes import check_parts, check_placement, require, sizes_of


def pipedream(request: ScheduleRequest) -> Schedule:
    """Return T minibatches of the endless order, with fill and drain at its ends."""
    told = request.parameters.get("replicas")
    if told is None:
        return endless_1f1b(request, "pipedream", WeightPolicy.STASH)
    return _round_robin(request, str(told))


def _round_robin(request: ScheduleRequest, told: str) -> Schedule:
    """Return the order of stages with workers of their own."""
    parts = told.split(",")
    require(
        all(part.strip().isdecimal() and int(part) > 0 for part in parts),
        f"replicas is {told!r}, it is one number of workers for each stage",
        field="replicas",
        hint="2,1 is two workers for the first of two stages",
    )
    workers = np.array([int(part) for part in parts])
    ranks, count, stages = request.num_ranks, request.num_microbatches, len(workers)
    check_parts(request, "pipedream", chunks=(1, "stage"), stages=(stages, f"{stages} stages"))
    require(workers.sum() == ranks, f"replicas {told} are {workers.sum()} workers on {ranks} ranks", field="replicas")
    require(
        not (count % workers).any(),
        f"{count} minibatches do not divide over the workers {told} of each stage",
        field="num_microbatches",
        hint=f"take a multiple of {math.lcm(*workers.tolist())}",
    )
    first = np.concatenate(([0], np.cumsum(workers)[:-1]))
    rows = np.arange(math.lcm(*workers.tolist()))
    placement = (first + rows[:, None] % workers).astype(np.int32)
    check_placement(request, placement, "pipedream")
    orders = []
    for stage, each in enumerate(workers.tolist()):
        in_flight = -(-int(workers[stage:].sum()) // each)
        for worker in range(each):
            own = np.arange(worker, count, each, dtype=np.int32)
            forwards, backwards = (order_of(int(k), stage, own, replica=own % len(rows)) for k in (Kind.F, Kind.B))
            orders.append(alternate(forwards, backwards, in_flight))
    return Schedule(
        "pipedream", count, placement, tuple(orders), weight_policy=WeightPolicy.STASH, parameters={"replicas": told}
    )


def endless_1f1b(
    request: ScheduleRequest,
    name: str,
    policy: WeightPolicy,
    parameters: Mapping[str, int | float | str] | None = None,
    *,
    num_periods: int = 1,
) -> Schedule:
    """Return the 1F1B order over `num_periods` times the request's microbatches, under a weight policy."""
    sizes = sizes_of(request, name)
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, name)
    total = sizes.num_microbatches * num_periods
    orders = tuple(alternate(*one_stage_passes(rank, total), sizes.num_ranks - rank) for rank in range(sizes.num_ranks))
    return Schedule(name, total, placement, orders, weight_policy=policy, parameters=dict(parameters or {}))


def noam(workers_by_stage: tuple[int, ...]) -> int:
    """Return the optimal number of minibatches in flight, ceil(workers / workers of the input stage)."""
    return -(-sum(workers_by_stage) // workers_by_stage[0])


FAMILY = ScheduleFamily(
    "pipedream",
    "Narayanan et al., PipeDream: Generalized Pipeline Parallelism for DNN Training, SOSP 2019",
    pipedream,
    synchronous=False,
    weight_policy=WeightPolicy.STASH,
)
