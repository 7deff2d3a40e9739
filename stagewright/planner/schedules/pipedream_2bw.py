"""PipeDream-2BW: double-buffered weights; gradients of T microbatches are applied at once, one update late.

    rank 0  F0 F1 F2 B0 F3 B1 F4 B2 | F5 B3 ...      2 versions on every rank, whatever D

The order is 1F1B without a flush over `parameters["updates"]` periods of T microbatches. With T >= D a microbatch needs
no weights older than the previous ones, so the delay is exactly one: W(t + 1) = W(t) - v grad f(W(t - 1)).

Paper: Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, ICML 2021.
"""

from __future__ import annotations

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.pipedream import endless_1f1b
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy
from stagewright.planner.schedules.sizes import require

RULE = "T is at least D, so that a microbatch needs no weights but the last two"


def pipedream_2bw(request: ScheduleRequest) -> Schedule:
    """Return `updates` periods (1 unless told) of T microbatches each."""
    require(
        request.num_microbatches >= request.num_ranks,
        f"2bw applies the gradients of at least D = {request.num_ranks} microbatches at once, "
        f"{request.num_microbatches} were asked for",
        field="num_microbatches",
        hint="give at least as many microbatches as ranks, or take pipedream",
    )
    periods = num_updates(request)
    parameters = {"updates": periods, "update_every": request.num_microbatches}
    return endless_1f1b(request, "2bw", WeightPolicy.DOUBLE_BUFFER, parameters, num_periods=periods)


def num_updates(request: ScheduleRequest) -> int:
    """Return how many optimizer updates the order holds: `parameters["updates"]`, 1 unless told."""
    updates = int(request.parameters.get("updates", 1))
    require(updates >= 1, f"updates is {updates}, an order holds at least 1", field="updates")
    return updates


FAMILY = ScheduleFamily(
    "2bw",
    "Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, ICML 2021",
    pipedream_2bw,
    aliases=("pipedream-2bw",),
    synchronous=False,
    weight_policy=WeightPolicy.DOUBLE_BUFFER,
    constraint=RULE,
)
