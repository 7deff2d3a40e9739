"""GraphPipe: stages form a graph, so that parallel branches run side by side and depth is the longest path.

Stage s runs on rank s and forwards as many microbatches as its longest path to the output has stages before it
alternates, as in 1F1B. Two branches of two stages joined by a fifth (edges 0-1, 1-4, 2-3, 3-4) have depth 3 instead of 5:

    rank 0  F0 F1 F2          B0 F3 ...
    rank 1     F0 F1       B0 F2 ...
    rank 2  F0 F1 F2          B0 F3 ...
    rank 3     F0 F1       B0 F2 ...
    rank 4        F0 B0 F1 B1 ...

With equal stages idle over total is (depth - 1) / (T + depth - 1), and a rank holds its path length in activations.
`request.edges` is the graph; a chain gives 1F1B.

Paper: Jeon et al., GraphPipe: Improving Performance and Scalability of DNN Training with Graph Pipeline Parallelism,
ASPLOS 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate, one_stage_passes
from stagewright.planner.schedules.schedule import Schedule, chain_edges
from stagewright.planner.schedules.sizes import check_placement, require

Edges = tuple[tuple[int, int], ...]
Placement = npt.NDArray[np.int32]


def graphpipe(request: ScheduleRequest) -> Schedule:
    """Return one stage on each rank, warm-up by the longest path to the output."""
    edges, placement = stage_graph_of(request, "graphpipe")
    ahead = path_lengths(request.num_ranks, edges)
    return graph_order(request, "graphpipe", edges, placement, ahead)


def graph_order(
    request: ScheduleRequest, name: str, edges: Edges, placement: Placement, num_warmup: Sequence[int]
) -> Schedule:
    """Return the schedule whose ranks forward so many microbatches before they alternate."""
    count = request.num_microbatches
    orders = tuple(alternate(*one_stage_passes(rank, count), warmup) for rank, warmup in enumerate(num_warmup))
    return Schedule(name, count, placement, orders, edges=edges)


def stage_graph_of(request: ScheduleRequest, name: str) -> tuple[Edges, Placement]:
    """Return the edges, those of a chain by default, and the placement of one stage on each rank.

    Raises InvalidArgument for sizes below 1, chunks, or costs of another number of stages.
    """
    ranks = request.num_ranks
    for field, value in (("num_ranks", ranks), ("num_microbatches", request.num_microbatches)):
        require(value >= 1, f"{field} is {value}, a pipeline has at least 1", field=field)
    require(
        request.num_chunks in (None, 1),
        f"{name} puts 1 stage on a rank, {request.num_chunks} were asked for",
        field="num_chunks",
    )
    require(
        request.costs is None or request.costs.num_stages == ranks,
        f"costs hold {request.costs.num_stages if request.costs else 0} stages, {ranks} ranks have {ranks}",
        field="costs",
    )
    placement = np.arange(ranks, dtype=np.int32)[None, :]
    check_placement(request, placement, name)
    return request.edges or chain_edges(ranks), placement


def path_lengths(num_stages: int, edges: Edges) -> list[int]:
    """Return, for each stage, the stages on the longest path from it to an output, itself included.

    Raises InvalidArgument for an edge to a stage that does not exist, or for a cycle.
    """
    for edge in edges:
        if not all(0 <= stage < num_stages for stage in edge):
            raise InvalidArgument(f"edge {edge} names a stage beyond the {num_stages} there are", field="edges")
    successors: dict[int, set[int]] = {stage: set() for stage in range(num_stages)}
    for source, target in edges:
        successors[source].add(target)
    try:
        order = tuple(TopologicalSorter(successors).static_order())
    except CycleError as error:
        raise InvalidArgument(f"the stage graph has a cycle: {error.args[1]}", field="edges") from error
    length = [1] * num_stages
    for stage in order:
        length[stage] = 1 + max((length[after] for after in successors[stage]), default=0)
    return length


FAMILY = ScheduleFamily(
    "graphpipe",
    "Jeon et al., GraphPipe: Improving Performance and Scalability of DNN Training with Graph Pipeline Parallelism, "
    "ASPLOS 2025",
    graphpipe,
)
