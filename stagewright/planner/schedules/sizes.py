"""The sizes of a request, checked once: every generator starts here.

A message names the rule and both numbers, because a size that does not fit is the most common mistake: an odd number of
ranks for a bidirectional pipeline, microbatches that do not divide, costs of another number of stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.schedule import chain_edges

Placement = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Checked sizes: D, T, v and K of the literature."""

    num_ranks: int
    num_microbatches: int
    num_chunks: int
    num_slices: int

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks


def sizes_of(
    request: ScheduleRequest,
    name: str,
    *,
    default_chunks: int = 1,
    least_chunks: int = 1,
    most_chunks: int | None = 1,
    sliced: bool = False,
) -> Sizes:
    """Return the sizes of `request` for the family `name`; raises InvalidArgument with the rule and both numbers."""
    chunks = default_chunks if request.num_chunks is None else request.num_chunks
    for field, value in (
        ("num_ranks", request.num_ranks),
        ("num_microbatches", request.num_microbatches),
        ("num_chunks", chunks),
        ("num_slices", request.num_slices),
    ):
        require(value >= 1, f"{field} is {value}, a pipeline has at least 1", field=field)
    require(
        chunks >= least_chunks and (most_chunks is None or chunks <= most_chunks),
        f"{name} puts {_chunk_range(least_chunks, most_chunks)} on a rank, {chunks} were asked for",
        field="num_chunks",
        hint="leave chunks out, or take interleaved, breadth-first, interleaved-zb or wave",
    )
    require(
        sliced or request.num_slices == 1,
        f"{name} keeps a microbatch whole (1 slice), {request.num_slices} slices were asked for",
        field="num_slices",
        hint="terapipe and seq1f1b cut a microbatch into slices of its sequence",
    )
    sizes = Sizes(request.num_ranks, request.num_microbatches, chunks, request.num_slices)
    _check_shape(request, sizes, name)
    return sizes


def check_parts(request: ScheduleRequest, name: str, *, chunks: tuple[int, str], stages: tuple[int, str]) -> None:
    """Check a family whose stages are no equal chunks of a rank: how many are on a rank and in all, each with what they are."""
    for field, value in (("num_ranks", request.num_ranks), ("num_microbatches", request.num_microbatches)):
        require(value >= 1, f"{field} is {value}, a pipeline has at least 1", field=field)
    require(
        request.num_chunks in (None, chunks[0]),
        f"{name} puts {chunks[0]} {chunks[1]} on a rank, {request.num_chunks} were asked for",
        field="num_chunks",
    )
    require(
        request.costs is None or request.costs.num_stages == stages[0],
        f"costs hold {request.costs.num_stages if request.costs else 0} stages, {stages[1]} are {stages[0]}",
        field="costs",
    )


def costs_of(request: ScheduleRequest, sizes: Sizes) -> StageCosts:
    """Return the costs of the virtual stages; equal unit shares, which the chunks divide, when the request has none."""
    return request.costs or StageCosts.uniform(sizes.num_stages, num_chunks=sizes.num_chunks)


def effort_of(request: ScheduleRequest, *, actions: float = 1e7) -> float:
    """Return how many actions a generator may time while it improves an order: `parameters["effort"]` times `actions`.

    Effort 0 keeps the constructed order; 1 costs at most about 0.15 s.
    """
    effort = float(request.parameters.get("effort", 1.0))
    require(effort >= 0 and np.isfinite(effort), f"effort is {effort}, it must be at least 0", field="effort")
    return effort * actions


def check_placement(request: ScheduleRequest, placement: Placement, name: str) -> None:
    """Raise InvalidArgument when the request asks for another placement than the family's own."""
    if request.placement is not None and not np.array_equal(request.placement, placement):
        raise InvalidArgument(
            f"{name} places its stages on ranks {placement.tolist()}, {request.placement.tolist()} was asked for",
            field="placement",
            hint="leave the placement out, or take auto",
        )


def require(holds: bool, message: str, *, field: str, hint: str | None = None) -> None:
    """Raise InvalidArgument unless the rule holds."""
    if not holds:
        raise InvalidArgument(message, field=field, hint=hint)


def _check_shape(request: ScheduleRequest, sizes: Sizes, name: str) -> None:
    count = sizes.num_stages
    if request.costs is not None:
        require(
            request.costs.num_stages == count,
            f"costs hold {request.costs.num_stages} stages, {sizes.num_ranks} ranks with {sizes.num_chunks} "
            f"chunks have {count}",
            field="costs",
        )
    require(
        not request.edges or request.edges == chain_edges(count),
        f"{name} runs a chain of stages, the request has a graph of {len(request.edges)} edges",
        field="edges",
        hint="graphpipe runs a graph of stages",
    )
    require(
        np.isfinite(request.latency_s) and request.latency_s >= 0,
        f"latency_s is {request.latency_s}, it must be at least 0",
        field="latency_s",
    )
    require(
        request.memory_cap is None or request.memory_cap > 0,
        f"memory_cap is {request.memory_cap}, it must be above 0",
        field="memory_cap",
    )


def _chunk_range(least: int, most: int | None) -> str:
    if most is None:
        return f"at least {least} stages"
    if least == most:
        return f"{most} stage{'s' if most > 1 else ''}"
    return f"{least} to {most} stages"
