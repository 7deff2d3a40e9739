"""AutoPipe's slicer: the first microbatches are halved, so that the start-up of the pipeline costs half.

The first n microbatches become 2 n of half the size; the order is 1F1B over the T + n units. The first unit reaches the
last stage after (D - 1) F / 2 instead of (D - 1) F. n is the smallest number with the shortest simulated makespan among
0 .. D, or `parameters["halved"]`.

    rank 0  f0 f0' F1 F2 ...        f: half of a microbatch
    rank 1    f0 f0' F1 ...

`unit_factors` gives each unit's share of a microbatch, which the simulator takes as `Shares.microbatch_time`.

Paper: Liu et al., AutoPipe: A Fast Pipeline Parallelism Approach with Balanced Partitioning and Micro-batch Slicing,
CLUSTER 2022.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, one_stage_passes
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import Sizes, check_placement, costs_of, require, sizes_of
from stagewright.planner.simulation.implied_shares import unit_factors


def autopipe(request: ScheduleRequest) -> Schedule:
    """Return 1F1B over units, the first 2 n of them halves."""
    sizes = sizes_of(request, "autopipe")
    check_placement(request, loop_placement(sizes.num_ranks), "autopipe")
    if "halved" in request.parameters:
        halved = int(request.parameters["halved"])
        require(
            0 <= halved <= sizes.num_microbatches,
            f"halved is {halved}, it is from 0 to the {sizes.num_microbatches} microbatches",
            field="halved",
        )
        return _sliced(sizes, halved)
    choices = range(min(sizes.num_ranks, sizes.num_microbatches) + 1)
    return _sliced(sizes, min(choices, key=lambda count: (_makespan_s(request, sizes, count), count)))


def _sliced(sizes: Sizes, halved: int) -> Schedule:
    units = sizes.num_microbatches + halved
    orders = tuple(alternate(*one_stage_passes(rank, units), sizes.num_ranks - rank) for rank in range(sizes.num_ranks))
    return Schedule("autopipe", units, loop_placement(sizes.num_ranks), orders, parameters={"halved": halved})


def _makespan_s(request: ScheduleRequest, sizes: Sizes, halved: int) -> float:
    """Return the makespan of 1F1B over the units: a longest path over (rank, unit, pass), O(D T)."""
    costs = costs_of(request, sizes)
    ranks, units = sizes.num_ranks, sizes.num_microbatches + halved
    factor = unit_factors(units, halved)
    forward_s, backward_s = costs.forward_s, costs.input_grad_s + costs.weight_grad_s
    forward_end = np.full((ranks, units), np.nan)
    backward_end = np.full((ranks, units), np.nan)
    orders = [alternate(*one_stage_passes(rank, units), ranks - rank) for rank in range(ranks)]
    position, clock = [0] * ranks, [0.0] * ranks
    progress = True
    while progress:
        progress = False
        for rank in range(ranks):
            while position[rank] < 2 * units:
                row = orders[rank][position[rank]]
                unit, is_forward = int(row[3]), row[0] == 0
                if is_forward:
                    ready = 0.0 if rank == 0 else forward_end[rank - 1, unit] + request.latency_s
                else:
                    last = rank == ranks - 1
                    ready = forward_end[rank, unit] if last else backward_end[rank + 1, unit] + request.latency_s
                if np.isnan(ready):
                    break
                seconds = (forward_s if is_forward else backward_s)[rank] * factor[unit]
                clock[rank] = max(clock[rank], float(ready)) + float(seconds)
                (forward_end if is_forward else backward_end)[rank, unit] = clock[rank]
                position[rank] += 1
                progress = True
    return max(clock)


FAMILY = ScheduleFamily(
    "autopipe",
    "Liu et al., AutoPipe: A Fast Pipeline Parallelism Approach with Balanced Partitioning and Micro-batch Slicing, "
    "CLUSTER 2022",
    autopipe,
)
