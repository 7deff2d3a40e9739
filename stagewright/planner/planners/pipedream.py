"""PipeDream's planner: the slowest stage of a replicated pipeline, minimised (Narayanan et al., SOSP 2019).

States are the ideals of the layer graph. With C, P, O the compute seconds, parameter bytes and boundary bytes of an
ideal, a stage is the difference of two nested ideals on m replicas, and its time is the largest of

    ( C + 4 (m - 1) P / (B m) ) / m,    2 O_in / (B m),    2 O_out / (B m)

(the boundary terms only where activations are counted). One level is a dynamic programme over (ideal, workers used):

    A[i, n] = min over i' < i nested, m <= n of max( A[i', n - m], stage(i', i, m) )

in O(I^2 n^2) for I ideals. With two network levels the best pipeline of every interval on the inner level stands for
compute on the outer one. The bottleneck is optimal over contiguous stages that use all workers, under full overlap
of compute and communication; fill, drain and unequal links within a level are not in the model.

On the common Problem all stages have equal degrees, so for each (replicas, depth, microbatch) the programme
cuts the chain with a stage's time for a whole step of T microbatches max(T t, gradient reduction, 2 T hop); memory is not
in the model. Plans run 1F1B with a flush, since the Problem is synchronous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.ideals import IdealLattice
from stagewright.planner.search.problem import Partition

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PipelineGraph:
    """Sums over each ideal of a layer graph, shape [num_ideals]; the empty ideal comes first, the whole graph last.

    Parameters
    ----------
    compute_s : forward and backward of one minibatch.
    parameter_bytes : weights.
    activation_bytes : outputs of all members, for the memory limit.
    boundary_bytes : outputs of the frontier, sent when a stage ends here.
    nested : bool [num_ideals, num_ideals], row inside column.
    """

    compute_s: Floats
    parameter_bytes: Floats
    activation_bytes: Floats
    boundary_bytes: Floats
    nested: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        lattice: IdealLattice,
        compute_s: Sequence[float],
        parameter_bytes: Sequence[float],
        output_bytes: Sequence[float],
    ) -> PipelineGraph:
        """Return the sums of per-node seconds, weights and output bytes over the ideals of `lattice`."""
        members = lattice.members.astype(np.float64)
        inside = members @ (1.0 - members.T) == 0
        return cls(
            members @ np.asarray(compute_s, dtype=np.float64),
            members @ np.asarray(parameter_bytes, dtype=np.float64),
            members @ np.asarray(output_bytes, dtype=np.float64),
            lattice.frontier.astype(np.float64) @ np.asarray(output_bytes, dtype=np.float64),
            np.ascontiguousarray(inside & ~np.eye(len(members), dtype=np.bool_)),
        )


@dataclass(frozen=True)
class ReplicatedStage:
    """The nodes between two ideals on `replicas` workers of the outer level."""

    first_ideal: int
    last_ideal: int
    replicas: int


@dataclass(frozen=True)
class PipelinePartition:
    """The optimal bottleneck and a partition that has it."""

    bottleneck_s: float
    stages: tuple[ReplicatedStage, ...]


def pipedream_partition(
    graph: PipelineGraph,
    *,
    workers: Sequence[int],
    bytes_per_s: Sequence[float],
    count_activations: bool = False,
    memory_bytes: float | None = None,
) -> PipelinePartition:
    """Return the partition with the smallest bottleneck on `workers` per network level, innermost first.

    Raises Infeasible when no partition fits `memory_bytes`, InvalidArgument for levels that do not match.
    """
    if len(workers) != len(bytes_per_s) or not 1 <= len(workers) <= 2:
        raise InvalidArgument(
            f"{len(workers)} levels of workers and {len(bytes_per_s)} bandwidths",
            field="workers",
            hint="one or two of each",
        )
    limit = np.inf if memory_bytes is None else float(memory_bytes)
    compute = graph.compute_s[None, :] - graph.compute_s[:, None]
    if len(workers) == 2:
        compute = _inner_bottlenecks(
            compute,
            graph.parameter_bytes,
            graph.boundary_bytes,
            graph.nested,
            workers[0],
            bytes_per_s[0],
            count_activations,
        )
    best, previous, used = _bottlenecks(
        np.ascontiguousarray(compute),
        graph.parameter_bytes,
        graph.activation_bytes,
        graph.boundary_bytes,
        graph.nested,
        0,
        int(workers[-1]),
        float(bytes_per_s[-1]),
        count_activations,
        limit,
    )
    last, count = len(graph.compute_s) - 1, int(workers[-1])
    if not np.isfinite(best[last, count]):
        raise Infeasible(f"no partition on {count} workers fits {limit:g} bytes a worker", field="memory_bytes")
    stages: list[ReplicatedStage] = []
    ideal, remaining = last, count
    while ideal:
        stages.append(ReplicatedStage(int(previous[ideal, remaining]), ideal, int(used[ideal, remaining])))
        ideal, remaining = stages[-1].first_ideal, remaining - stages[-1].replicas
    return PipelinePartition(float(best[last, count]), tuple(reversed(stages)))


@njit(cache=True)
def _bottlenecks(
    compute: Floats,
    parameters: Floats,
    activations: Floats,
    boundary: Floats,
    nested: npt.NDArray[np.bool_],
    start: int,
    workers: int,
    bandwidth: float,
    count_activations: bool,
    limit: float,
) -> tuple[Floats, Ints, Ints]:
    """Return A[ideal, workers] from ideal `start` on, with the choices (previous ideal, replicas) that reach it."""
    num_ideals = compute.shape[0]
    best = np.full((num_ideals, workers + 1), np.inf)
    previous = np.zeros((num_ideals, workers + 1), dtype=np.int64)
    chosen = np.zeros((num_ideals, workers + 1), dtype=np.int64)
    best[start, 0] = 0.0
    for end in range(start + 1, num_ideals):
        for begin in range(start, end):
            if not nested[begin, end]:
                continue
            work = compute[begin, end]
            size = parameters[end] - parameters[begin]
            message = 0.0
            if count_activations:
                if begin > 0:
                    message = 2.0 * boundary[begin] / bandwidth
                if end < num_ideals - 1:
                    message = max(message, 2.0 * boundary[end] / bandwidth)
            held = activations[end] - activations[begin] + size
            for replicas in range(1, workers + 1):
                stage = (work + 4.0 * (replicas - 1) * size / (bandwidth * replicas)) / replicas
                stage = max(stage, message / replicas)
                for before in range(workers - replicas + 1):
                    value = max(best[begin, before], stage)
                    if value < best[end, before + replicas]:
                        if limit < np.inf and -(-(workers - before) // replicas) * held > limit:
                            continue
                        best[end, before + replicas] = value
                        previous[end, before + replicas] = begin
                        chosen[end, before + replicas] = replicas
    return best, previous, chosen


@njit(cache=True)
def _inner_bottlenecks(
    compute: Floats,
    parameters: Floats,
    boundary: Floats,
    nested: npt.NDArray[np.bool_],
    workers: int,
    bandwidth: float,
    count_activations: bool,
) -> Floats:
    """Return the best bottleneck of every interval on all inner workers, shape [num_ideals, num_ideals]."""
    num_ideals = compute.shape[0]
    result = np.full((num_ideals, num_ideals), np.inf)
    nothing = np.zeros(num_ideals)
    for start in range(num_ideals):
        best, _, _ = _bottlenecks(
            compute, parameters, nothing, boundary, nested, start, workers, bandwidth, count_activations, np.inf
        )
        result[start] = best[:, workers]
    return result


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    count = table.num_microbatches
    cost = np.maximum(count * table.time_s, table.reduction_s)
    cost = np.maximum(cost, 2.0 * count * np.maximum(table.in_hop_s, table.out_hop_s))
    found = least_bottleneck(cost, table.num_ranks)
    if found is not None:
        yield found.value, table.partition(found.bounds)


PLANNER = table_planner(
    "pipedream",
    "Narayanan et al., PipeDream: Generalized Pipeline Parallelism for DNN Training, SOSP 2019",
    _solve_one,
    reach=Reach(),
    objective="seconds of the slowest stage",
)
