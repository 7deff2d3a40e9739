"""Groups of context-parallel devices of different size for one batch of sequences of different length.

One batch holds short and long sequences. Splitting all of them over as many devices as the longest needs pays the exchange of
keys and values, and tiny kernels, for the short ones; FlexSP (Wang et al., ASPLOS 2025) makes groups of different degrees for
each step, and so do ByteScale (Ge et al. 2025), Megatron's hybrid context parallelism and Dynamic-CP. With t_bd seconds of
forward and backward of a sequence of length b on d devices, n_b such sequences, and N / d places for a group of degree d,

    min z
    s.t.  sum_p x_bp = n_b                   each sequence in a group
          sum_b t_b,d(p) x_bp <= z           a group runs its sequences one after another
          x_bp <= n_b u_p                    in groups that are there
          sum_p d(p) u_p <= N                each device in one group
          x_bp = 0 where a sequence of length b does not fit d(p) devices

modelled in PuLP, solved by HiGHS: exact up to the asked gap, or the best so far at the time limit with the bound that is left.
Groups of one degree are ordered by load, which breaks their symmetry. t_bd comes from the common cost model: states sharded by
ZeRO over all N devices whatever the groups are (so reduction, gathers and optimizer are the same for every answer), and the
recomputation of least seconds with which the sequence fits. Degrees are powers of two.

Not modelled: packing several short sequences into one microbatch, more than one model replica's pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pulp

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.groups import strided_group
from stagewright.planner.cost.joined_replicas import JoinedReplicas
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.planned_devices import base_bytes
from stagewright.planner.planned_schedule import OPTIONS
from stagewright.planner.search.layer_costs import Configuration, layer_costs

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SequenceCosts:
    """What sequences of B lengths cost on groups of K degrees.

    Parameters
    ----------
    lengths : tokens, ascending, [B]; degrees : powers of two, ascending, [K].
    seconds : forward and backward of one sequence, [B, K]; infinite where it does not fit.
    once_s : reduction of the gradients and optimizer, once a step.
    """

    lengths: tuple[int, ...]
    degrees: tuple[int, ...]
    seconds: Floats
    once_s: float


@dataclass(frozen=True)
class SequenceGroup:
    """Devices that split the same sequences: how many, how many sequences of each length, and their seconds together."""

    degree: int
    counts: tuple[tuple[int, int], ...]
    seconds: float


@dataclass(frozen=True)
class GroupedBatch:
    """Groups for a batch, the step they make, and a proved bound of the step over all groupings."""

    groups: tuple[SequenceGroup, ...]
    step_s: float
    bound_s: float


def sequence_costs(
    profile: ModelProfile, cluster: Cluster, job: TrainingJob, lengths: Sequence[int], *, zero: int = 3
) -> SequenceCosts:
    """Return the costs of sequences on the devices of a cluster of one kind.

    Raises InvalidArgument for a mixed cluster, and for lengths below 1.
    """
    if cluster.is_mixed:
        raise InvalidArgument(
            f"cluster {cluster.name} has {len(cluster.groups)} groups, sequences are grouped on one kind of device",
            field="cluster",
        )
    if not lengths or min(lengths) < 1:
        raise InvalidArgument(f"lengths are {list(lengths)}, a sequence has at least one token", field="lengths")
    devices = cluster.num_devices
    degrees = tuple(1 << power for power in range(devices.bit_length()) if devices % (1 << power) == 0)
    known = tuple(sorted(set(lengths)))
    rows = [[_one(profile, cluster, job, length, degree, zero) for degree in degrees] for length in known]
    return SequenceCosts(
        known,
        degrees,
        np.array([[seconds for seconds, _ in row] for row in rows]),
        max((once for row in rows for _, once in row), default=0.0),
    )


def _one(
    profile: ModelProfile, cluster: Cluster, job: TrainingJob, length: int, degree: int, zero: int
) -> tuple[float, float]:
    """Return the seconds of one sequence on a group, and those once a step."""
    devices, group = cluster.num_devices, cluster.groups[0]
    own = job.model_copy(update={"sequence_length": length})
    model = CostModel(profile, cluster, own, OPTIONS)
    degrees = Degrees(dp=devices // degree, cp=degree, zero=zero)
    if model.split_legality(degrees, 1) is not None or length < 2 * degree:
        return float("inf"), 0.0
    row = layer_costs(
        model, Configuration(degrees, 1, 1, 1), joined=JoinedReplicas(strided_group(devices, 1, group), devices)
    )
    room = group.device.memory_bytes * (1.0 - job.space.memory_headroom) - base_bytes(profile, group.device)
    need = row.static_bytes.sum() + row.kept_bytes.sum(axis=1) + row.workspace_bytes.max(axis=1)
    again = row.recompute_s.sum(axis=1)
    fitting = np.where(need <= room, again, np.inf)
    return float(row.time_s.sum() + fitting.min()), float(row.step_s.sum() + row.stage_latency_s)


def uniform_step_s(costs: SequenceCosts, counts: Mapping[int, int], num_devices: int, degree: int) -> float:
    """Return the step when all groups have one degree and sequences go, longest first, where least is to do."""
    place = costs.degrees.index(degree)
    loads = np.zeros(num_devices // degree)
    for length in sorted(counts, reverse=True):
        for _ in range(counts[length]):
            loads[int(np.argmin(loads))] += costs.seconds[costs.lengths.index(length), place]
    return float(loads.max()) + costs.once_s


def group_sequences(
    costs: SequenceCosts, counts: Mapping[int, int], num_devices: int, *, gap: float = 0.0, time_limit_s: float = 10.0
) -> GroupedBatch:
    """Return the groups of least step for `counts` sequences of each length.

    Raises Infeasible when a sequence fits no group.
    """
    finite = np.isfinite(costs.seconds)
    for length in counts:
        if not finite[costs.lengths.index(length)].any():
            raise Infeasible(
                f"a sequence of {length} tokens fits no group of up to {max(costs.degrees)} devices",
                field="lengths",
                hint="take more devices, or shard the states further",
            )
    places = [(place, degree) for place, degree in enumerate(costs.degrees) for _ in range(num_devices // degree)]
    scale = 1.0 / float(costs.seconds[finite].max())
    model = pulp.LpProblem("sequence_groups", pulp.LpMinimize)
    slowest = pulp.LpVariable("slowest", 0)
    used = [pulp.LpVariable(f"u_{p}", cat="Binary") for p in range(len(places))]
    taken = {
        (length, p): pulp.LpVariable(f"x_{length}_{p}", 0, counts[length], cat="Integer")
        for length in sorted(counts)
        for p, (place, _) in enumerate(places)
        if finite[costs.lengths.index(length), place]
    }
    loads = [
        pulp.lpSum(
            scale * float(costs.seconds[costs.lengths.index(length), place]) * x
            for (length, at), x in taken.items()
            if at == p
        )
        for p, (place, _) in enumerate(places)
    ]
    model += slowest
    model += pulp.lpSum(degree * u for (_, degree), u in zip(places, used, strict=True)) <= num_devices
    for length, count in counts.items():
        model += pulp.lpSum(x for (own, _), x in taken.items() if own == length) == count
    for (length, p), x in taken.items():
        model += x <= counts[length] * used[p]
    for p, load in enumerate(loads):
        model += load <= slowest
        if p and places[p][1] == places[p - 1][1]:
            model += used[p] <= used[p - 1]
            model += load <= loads[p - 1]
    work = scale * sum(
        count * float((costs.seconds[costs.lengths.index(length)] * np.array(costs.degrees)).min())
        for length, count in counts.items()
    )
    model += slowest >= work / num_devices
    model.solve(pulp.HiGHS(msg=False, threads=1, gapRel=gap, timeLimit=time_limit_s))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return _uniform(costs, counts, num_devices, work / scale / num_devices)
    groups = []
    for p, (place, degree) in enumerate(places):
        own = [(length, round(x.value() or 0.0)) for (length, at), x in taken.items() if at == p]
        held = tuple((length, count) for length, count in own if count)
        if held:
            seconds = sum(count * float(costs.seconds[costs.lengths.index(length), place]) for length, count in held)
            groups.append(SequenceGroup(degree, held, seconds))
    longest = max(group.seconds for group in groups)
    proved = model.sol_status == pulp.LpSolutionOptimal
    bound = longest / (1.0 + gap) if proved else work / scale / num_devices
    return GroupedBatch(tuple(groups), longest + costs.once_s, bound + costs.once_s)


def _uniform(costs: SequenceCosts, counts: Mapping[int, int], num_devices: int, least_s: float) -> GroupedBatch:
    """Return the best groups of one degree, for a solver that found nothing in its time."""
    steps = {degree: uniform_step_s(costs, counts, num_devices, degree) for degree in costs.degrees}
    degree = min(steps, key=lambda each: steps[each])
    place = costs.degrees.index(degree)
    loads: list[dict[int, int]] = [{} for _ in range(num_devices // degree)]
    seconds = np.zeros(len(loads))
    for length in sorted(counts, reverse=True):
        for _ in range(counts[length]):
            at = int(np.argmin(seconds))
            loads[at][length] = loads[at].get(length, 0) + 1
            seconds[at] += costs.seconds[costs.lengths.index(length), place]
    groups = tuple(
        SequenceGroup(degree, tuple(sorted(load.items())), float(total))
        for load, total in zip(loads, seconds, strict=True)
        if load
    )
    return GroupedBatch(groups, steps[degree], least_s + costs.once_s)
