"""A named schedule generated and timed with equal stages: what most tests of generators ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.schedules.registry import family, generate
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.timeline import Timeline


@dataclass(frozen=True, eq=False)
class Timed:
    """A schedule, its simulated timeline and the peak of each rank in rank-microbatches, freed at W."""

    schedule: Schedule
    timeline: Timeline
    peaks: np.ndarray

    @property
    def makespan_s(self) -> float:
        return self.timeline.makespan_s

    @property
    def span_bubble_s(self) -> float:
        """Longest span less the busiest rank's work."""
        return self.timeline.longest_span_s - self.timeline.ideal_s


def request(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    seconds: tuple[float, float, float] = (1.0, 1.0, 1.0),
    latency_s: float = 0.0,
    *,
    chunks: int | None = None,
    waves: int | None = None,
    slices: int = 1,
    memory_cap: float | None = None,
    parameters: Mapping[str, int | float | str] | None = None,
) -> ScheduleRequest:
    """Return a request with equal stages; `seconds` are F, I and W of one rank's whole share."""
    chunks_held = 2 * waves if waves else chunks or family(name).default_chunks
    forward_s, input_grad_s, weight_grad_s = seconds
    costs = StageCosts.uniform(
        num_ranks * chunks_held,
        forward_s=forward_s,
        input_grad_s=input_grad_s,
        weight_grad_s=weight_grad_s,
        num_chunks=chunks_held,
    )
    return ScheduleRequest(
        num_ranks,
        num_microbatches,
        num_chunks=chunks,
        num_waves=waves,
        num_slices=slices,
        costs=costs,
        latency_s=latency_s,
        memory_cap=memory_cap,
        parameters=parameters or {},
    )


def timed(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    seconds: tuple[float, float, float] = (1.0, 1.0, 1.0),
    latency_s: float = 0.0,
    **options: object,
) -> Timed:
    """Return the schedule with its simulated timeline; options are those of `request`."""
    asked = request(name, num_ranks, num_microbatches, seconds, latency_s, **options)  # type: ignore[arg-type]
    schedule = generate(name, asked)
    assert asked.costs is not None
    timeline = simulate(schedule, asked.costs, links=Links(latency_s=latency_s), trace=False)
    return Timed(schedule, timeline, peak_activations(schedule, asked.costs))


def sizes(*, most_ranks: int = 16, most_microbatches: int = 64, thin: bool) -> list[tuple[int, int]]:
    """Return all (D, T) with D >= 2, or a covering sample: small ones, multiples, neighbours of multiples and the ends."""
    everything = [(d, t) for d in range(2, most_ranks + 1) for t in range(1, most_microbatches + 1)]
    if not thin:
        return everything
    edge = {1, 2, 3, most_microbatches}
    ranks = {2, 3, 4, 5, 6, 8, 11, 16}
    return [(d, t) for d, t in everything if d in ranks and (t in edge or t % d in (0, 1) or t == 2 * d - 1)]
