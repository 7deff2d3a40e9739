"""Throughput-optimal partition over accelerators and CPUs (Tarnawski et al., NeurIPS 2020).

Nodes that must stay together (forward and backward of a layer) form groups; costs, sizes and edges are those of the
members. The load of an accelerator that holds the groups S is the time of its nodes plus the cost of each tail u of
an edge with exactly one end in S, once for each u; a CPU's load is the time of its nodes alone. The largest load is
minimised.

*Contiguous* (each device a difference of nested ideals, `partition_contiguous`): a dynamic programme over ideals,

    dp[I, k, l] = min over I' < I of min( max(dp[I', k - 1, l], acc(I \\ I')), max(dp[I', k, l - 1], cpu(I \\ I')) )

in O(|ideals|^2 (k + 1)(l + 1)), exact. *Any sets* (`partition_any`): an integer programme in PuLP,

    min L   s.t.  sum_i x[v, i] = 1,   in[u, i] >= x[w, i] - x[u, i],   out[u, i] >= x[u, i] - x[w, i]  for edges (u, w),
                  sum_v size[v] x[v, i] <= M,   sum_v p[v] x[v, i] + sum_u c[u] (in[u, i] + out[u, i]) <= L,

started from the contiguous optimum and with equal accelerators ordered by their first group. HiGHS gives the optimum
or, at the limit, the incumbent and the proven bound.

On the common Problem layers follow one topological order (the paper's linearised variant, DPL), every accelerator is one
rank of equal replicas, and a stage's load for a step of T microbatches is max(T (time + messages in and out, both ways),
gradient reduction), the paper's replication; memory is the states and one microbatch of each layer, as the paper counts
it. No CPUs. Fill and drain of the pipeline are not in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.errors import Infeasible
from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.ideals import IdealLattice
from stagewright.planner.search.problem import Partition

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class DeviceProblem:
    """Groups of nodes to be placed on k accelerators and l CPUs.

    Parameters
    ----------
    accelerator_s, cpu_s, size_bytes : sums over each group's nodes, shape [num_groups]; `inf` where not supported.
    tail_group : group of each tail node u, shape [num_tails].
    tail_cost_s : cost of sending u's output, shape [num_tails].
    head_start, head_group : for tail u, the groups of its heads are head_group[head_start[u] : head_start[u + 1]].
    """

    accelerator_s: Floats
    cpu_s: Floats
    size_bytes: Floats
    tail_group: Ints
    tail_cost_s: Floats
    head_start: Ints
    head_group: Ints
    num_accelerators: int
    num_cpus: int
    memory_bytes: float


@dataclass(frozen=True)
class DevicePartition:
    """Groups of each device in pipeline order, with the largest load and the proven bound.

    `devices` holds (kind, groups) with kind "accelerator" or "cpu".
    """

    max_load_s: float
    bound_s: float
    devices: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def is_optimal(self) -> bool:
        return self.max_load_s <= self.bound_s * (1 + 1e-6)


def partition_contiguous(problem: DeviceProblem, lattice: IdealLattice) -> DevicePartition:
    """Return the optimal partition into differences of nested ideals; raises Infeasible when nothing fits."""
    best, previous, on_cpu = _loads_over_ideals(
        np.ascontiguousarray(lattice.members),
        lattice.words(),
        problem.accelerator_s,
        problem.cpu_s,
        problem.size_bytes,
        problem.tail_group,
        problem.tail_cost_s,
        problem.head_start,
        problem.head_group,
        problem.num_accelerators,
        problem.num_cpus,
        problem.memory_bytes,
    )
    last = lattice.num_ideals - 1
    accelerators, cpus = np.unravel_index(int(np.argmin(best[last])), best[last].shape)
    value = float(best[last, accelerators, cpus])
    if not np.isfinite(value):
        raise Infeasible(
            f"no contiguous partition fits {problem.num_accelerators} accelerators of {problem.memory_bytes:g} bytes "
            f"and {problem.num_cpus} CPUs",
            field="memory_bytes",
        )
    devices: list[tuple[str, tuple[int, ...]]] = []
    ideal, k, cpu_count = last, int(accelerators), int(cpus)
    while ideal:
        begin, is_cpu = int(previous[ideal, k, cpu_count]), bool(on_cpu[ideal, k, cpu_count])
        groups = np.flatnonzero(lattice.members[ideal] & ~lattice.members[begin])
        devices.append(("cpu" if is_cpu else "accelerator", tuple(groups.tolist())))
        ideal, k, cpu_count = begin, k - (not is_cpu), cpu_count - is_cpu
    return DevicePartition(value, value, tuple(reversed(devices)))


def partition_any(problem: DeviceProblem, start: DevicePartition, *, time_limit_s: float = 300.0) -> DevicePartition:
    """Return the optimal partition into any sets, or the incumbent and bound at the limit; `start` is never worsened."""
    from stagewright.planner.planners.tarnawski_ip import solve_any_sets

    return solve_any_sets(problem, start, time_limit_s=time_limit_s)


def accelerator_load_s(problem: DeviceProblem, inside: Bools) -> float:
    """Return the load of an accelerator that holds the groups where `inside` is true; inf when it does not fit."""
    return float(
        _accelerator_load(
            inside,
            problem.accelerator_s,
            problem.size_bytes,
            problem.tail_group,
            problem.tail_cost_s,
            problem.head_start,
            problem.head_group,
            problem.memory_bytes,
        )
    )


@njit(cache=True)
def _accelerator_load(
    inside: Bools,
    accelerator_s: Floats,
    size_bytes: Floats,
    tail_group: Ints,
    tail_cost_s: Floats,
    head_start: Ints,
    head_group: Ints,
    memory_bytes: float,
) -> float:
    load = 0.0
    size = 0.0
    for group in range(len(inside)):
        if inside[group]:
            load += accelerator_s[group]
            size += size_bytes[group]
    if size > memory_bytes:
        return np.inf
    for tail in range(len(tail_group)):
        tail_inside = inside[tail_group[tail]]
        for position in range(head_start[tail], head_start[tail + 1]):
            if inside[head_group[position]] != tail_inside:
                load += tail_cost_s[tail]
                break
    return load


@njit(cache=True)
def _loads_over_ideals(
    members: Bools,
    words: npt.NDArray[np.uint64],
    accelerator_s: Floats,
    cpu_s: Floats,
    size_bytes: Floats,
    tail_group: Ints,
    tail_cost_s: Floats,
    head_start: Ints,
    head_group: Ints,
    num_accelerators: int,
    num_cpus: int,
    memory_bytes: float,
) -> tuple[Floats, Ints, Bools]:
    num_ideals, num_groups = members.shape
    shape = (num_ideals, num_accelerators + 1, num_cpus + 1)
    best = np.full(shape, np.inf)
    previous = np.zeros(shape, dtype=np.int64)
    on_cpu = np.zeros(shape, dtype=np.bool_)
    best[0] = 0.0
    cpu_work = members.astype(np.float64) @ cpu_s
    inside = np.zeros(num_groups, dtype=np.bool_)
    for end in range(1, num_ideals):
        for begin in range(end - 1, -1, -1):
            nested = True
            for word in range(words.shape[1]):
                if words[begin, word] & ~words[end, word]:
                    nested = False
                    break
            if not nested:
                continue
            cpu_load = cpu_work[end] - cpu_work[begin]
            for group in range(num_groups):
                inside[group] = members[end, group] and not members[begin, group]
            load = _accelerator_load(
                inside, accelerator_s, size_bytes, tail_group, tail_cost_s, head_start, head_group, memory_bytes
            )
            for k in range(num_accelerators + 1):
                for cpu in range(num_cpus + 1):
                    if k > 0:
                        value = max(best[begin, k - 1, cpu], load)
                        if value < best[end, k, cpu]:
                            best[end, k, cpu] = value
                            previous[end, k, cpu] = begin
                            on_cpu[end, k, cpu] = False
                    if cpu > 0:
                        value = max(best[begin, k, cpu - 1], cpu_load)
                        if value < best[end, k, cpu]:
                            best[end, k, cpu] = value
                            previous[end, k, cpu] = begin
                            on_cpu[end, k, cpu] = True
    return best, previous, on_cpu


def stage_load_s(table: StageTable) -> Floats:
    """Return the load of every layer range for a step, infinite where it does not fit."""
    once = table.time_s + 2.0 * (table.in_hop_s + table.out_hop_s)
    load = np.maximum(table.num_microbatches * once, table.reduction_s)
    return np.where(table.fits(table.levels[0], 1.0), load, np.inf)


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    found = least_bottleneck(stage_load_s(table), table.num_ranks)
    if found is not None:
        yield found.value, table.partition(found.bounds)


PAPER = "Tarnawski et al., Efficient Algorithms for Device Placement of DNN Graph Operators, NeurIPS 2020"

PLANNER = table_planner(
    "tarnawski-dp",
    PAPER,
    _solve_one,
    reach=Reach(),
    objective="seconds of the largest load",
    aliases=("tarnawski",),
)
