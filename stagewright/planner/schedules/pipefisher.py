"""PipeFisher: foreign work placed in the bubbles of a pipeline, without making it longer.

K-FAC's curvature, inversion and preconditioning are refreshed every few steps and can wait for a bubble. Given the
timeline of a schedule and work items for each rank, `filled` inserts them as `FILL` actions into idle gaps, longest item
first into the first gap it fits; what fits nowhere is left out and counted. The makespan stays what it was. At D = 4 and
tB = 2 tF a rank idles (D - 1)(tF + tB) = 9 tF.

The family fills 1F1B with items of `parameters["fill_s"]` seconds (a quarter of a forward unless told), as many as fit.

Paper: Osawa et al., PipeFisher: Efficient Training of Large Language Models Using Pipelining and Fisher Information
Matrices, MLSys 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.one_f_one_b import one_f_one_b
from stagewright.planner.schedules.schedule import Schedule, encode
from stagewright.planner.schedules.sizes import costs_of, require, sizes_of
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.timeline import COMPUTE_LANE, Timeline

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Filled:
    """A schedule with its items: `fill_s` is the seconds of each placed item, `num_left_out` how many fitted nowhere."""

    schedule: Schedule
    fill_s: Floats
    num_left_out: int


def pipefisher(request: ScheduleRequest) -> Schedule:
    """Return 1F1B with as many equal work items as its bubbles hold."""
    sizes = sizes_of(request, "pipefisher")
    costs = costs_of(request, sizes)
    fill_s = float(request.parameters.get("fill_s", costs.forward_s.mean() / 4))
    require(np.isfinite(fill_s) and fill_s > 0, f"fill_s is {fill_s}, an item takes time", field="fill_s")
    base = one_f_one_b(request)
    timeline = simulate(base, costs, links=Links(latency_s=request.latency_s), trace=False)
    room = [
        int(sum((end - start + 1e-12) // fill_s for start, end in gaps(timeline, rank)))
        for rank in range(sizes.num_ranks)
    ]
    found = filled(base, timeline, [[fill_s] * count for count in room])
    parameters = {"fill_s": fill_s, "items": len(found.fill_s)}
    return replace(found.schedule, name="pipefisher", parameters=parameters)


def gaps(timeline: Timeline, rank: int) -> list[tuple[float, float]]:
    """Return the idle (start, end) seconds of a rank between the start and the end of the whole timeline."""
    mine = (timeline.rank == rank) & (timeline.lane == COMPUTE_LANE)
    starts, ends = timeline.start_s[mine], timeline.end_s[mine]
    first, last = float(timeline.start_s.min()), float(timeline.end_s.max())
    edges = zip([first, *ends.tolist()], [*starts.tolist(), last], strict=True)
    return [(start, end) for start, end in edges]


def filled(schedule: Schedule, timeline: Timeline, items_s: Sequence[Sequence[float]]) -> Filled:
    """Return `schedule` with the items of each rank, `items_s[rank]` in seconds, placed in its idle gaps."""
    seconds: list[float] = []
    left_out = 0
    orders = []
    for rank in range(schedule.num_ranks):
        room = [end - start for start, end in gaps(timeline, rank)]
        placed: list[list[int]] = [[] for _ in room]
        for item in sorted(items_s[rank], reverse=True):
            spot = next((index for index, free in enumerate(room) if free + 1e-12 >= item), None)
            if spot is None:
                left_out += 1
                continue
            room[spot] -= item
            placed[spot].append(len(seconds))
            seconds.append(item)
        stage = int(np.flatnonzero((schedule.placement == rank).any(axis=0))[0])
        steps: list[Action | tuple[Action, ...]] = []
        for step, numbers in zip([None, *schedule.actions(rank)], placed, strict=True):
            if step is not None:
                steps.append(step)
            steps += [Action(Kind.FILL, stage, number) for number in numbers]
        orders.append(encode(steps))
    return Filled(replace(schedule, orders=tuple(orders)), np.array(seconds), left_out)


FAMILY = ScheduleFamily(
    "pipefisher",
    "Osawa et al., PipeFisher: Efficient Training of Large Language Models Using Pipelining and Fisher Information "
    "Matrices, MLSys 2023",
    pipefisher,
)
