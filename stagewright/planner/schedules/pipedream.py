"""PipeDream: 1F1B that never flushes; the backward of a minibatch uses the weights its forward used (weight stashing).

    rank 0  F0 F1 F2 B0 F3 B1 F4 B2 ...      3 versions
    rank 1     F0 F1 B0 F2 B1 F3 ...         2 versions
    rank 2        F0 B0 F1 B1 ...            1 version

Each minibatch ends with an update of its stage, so rank d keeps up to D - d versions of its weights. Idle over total
is (D - 1) / (T + D - 1) for T minibatches and vanishes as training goes on. The trajectory is the delayed one,
w(t + 1) = w(t) - v grad f(w_1(t - D + 1), ..., w_D(t)), not that of synchronous training.

Paper: Narayanan et al., PipeDream: Generalized Pipeline Parallelism for DNN Training, SOSP 2019.
"""

from __future__ import annotations

from collections.abc import Mapping

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, one_stage_passes
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy, loop_placement
from stagewright.planner.schedules.sizes import check_placement, sizes_of


def pipedream(request: ScheduleRequest) -> Schedule:
    """Return T minibatches of the endless order, with fill and drain at its ends."""
    return endless_1f1b(request, "pipedream", WeightPolicy.STASH)


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
