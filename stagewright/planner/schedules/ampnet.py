"""AMPNet: no fixed order; each rank takes the messages as they arrive, with a bound on the keys in flight.

A minibatch (a key) is a message that travels forward through the stages and back. A rank serves its queue first come,
first served; the source admits a new key while fewer than `parameters["max_active_keys"]` (D unless told) are in
flight. Each backward updates its stage at once and nothing is stashed, so forward and backward of a key see different
weights: convergence is poor on many models, and the plan says so.

The order is what this queueing gives for the request's costs and latency, by event simulation in O(T D log(T D)).

Paper: Gaunt et al., AMPNet: Asynchronous Model-Parallel Training for Dynamic Neural Networks, 2017.
"""

from __future__ import annotations

import heapq

from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy, encode, loop_placement
from stagewright.planner.schedules.sizes import Sizes, check_placement, costs_of, require, sizes_of


def ampnet(request: ScheduleRequest) -> Schedule:
    """Return the order that message passing gives."""
    sizes = sizes_of(request, "ampnet")
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "ampnet")
    active = int(request.parameters.get("max_active_keys", sizes.num_ranks))
    require(active >= 1, f"max_active_keys is {active}, at least 1 key is in flight", field="max_active_keys")
    orders = tuple(encode(actions) for actions in _serve(request, sizes, active))
    return Schedule(
        "ampnet",
        sizes.num_microbatches,
        placement,
        orders,
        weight_policy=WeightPolicy.NONE,
        parameters={"max_active_keys": active},
    )


def _serve(request: ScheduleRequest, sizes: Sizes, max_active: int) -> list[list[Action]]:
    costs = costs_of(request, sizes)
    last = sizes.num_ranks - 1
    order: list[list[Action]] = [[] for _ in range(sizes.num_ranks)]
    free_at = [0.0] * sizes.num_ranks
    admitted = min(max_active, sizes.num_microbatches)
    messages = [(0.0, key, 0, 0, key) for key in range(admitted)]  # arrival, sequence, rank, backward?, key
    sequence = admitted
    heapq.heapify(messages)
    while messages:
        arrival, _, rank, backward, key = heapq.heappop(messages)
        start = max(arrival, free_at[rank])
        if start > arrival:
            heapq.heappush(messages, (start, sequence, rank, backward, key))
            sequence += 1
            continue
        seconds = (
            float(costs.input_grad_s[rank] + costs.weight_grad_s[rank]) if backward else float(costs.forward_s[rank])
        )
        end = start + seconds
        free_at[rank] = end
        order[rank].append(Action(Kind.B if backward else Kind.F, rank, key))
        if backward and rank == 0:
            if admitted < sizes.num_microbatches:
                heapq.heappush(messages, (end, sequence, 0, 0, admitted))
                admitted += 1
        elif backward:
            heapq.heappush(messages, (end + request.latency_s, sequence, rank - 1, 1, key))
        elif rank == last:
            heapq.heappush(messages, (end, sequence, rank, 1, key))
        else:
            heapq.heappush(messages, (end + request.latency_s, sequence, rank + 1, 0, key))
        sequence += 1
    return order


FAMILY = ScheduleFamily(
    "ampnet",
    "Gaunt et al., AMPNet: Asynchronous Model-Parallel Training for Dynamic Neural Networks, 2017",
    ampnet,
    synchronous=False,
    weight_policy=WeightPolicy.NONE,
)
