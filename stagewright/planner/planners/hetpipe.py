"""HetPipe (Park et al., USENIX ATC 2020): virtual workers of mixed GPUs, each a pipeline, joined by wave-synchronous updates.

    1  allocation   GPUs to virtual workers: a worker a node (NP), one GPU of each node a worker (ED), or fast nodes paired
                    with slow ones (HD)
    2  partition    per worker and order of its GPU types: contiguous layers of least bottleneck, each stage within its
                    GPU's memory with the minibatches in flight there, min(Nm, K - k) of them
    3  waves        Nm minibatches run at once; a worker pushes its sum to the parameter server once a wave, so a minibatch
                    pays 1/Nm of the 2 S bytes that are pushed and pulled

The order of types is enumerated and each partition a dynamic programme, O(K! K L^2) with equal GPUs counted once: exact for
the bottleneck (HetPipe solves it as an integer programme with CPLEX; `search.device_assignment_ip` is that one). With Nm
in flight a minibatch takes max(max_k t_k, sum_k t_k / Nm), and Nm is the one of least time whose stages fit.

Wave-synchronous parallel with clock distance D: a worker that has pushed wave c begins wave c + 1's pull only when every
worker has pushed wave c - D. Minibatches miss at most s_local = Nm - 1 updates of their own worker, and

    s_global = (D + 1) (s_local + 1) + s_local - 1

of another: `missing_updates` counts them from the protocol. In the long run all workers run at the rate of the slowest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Literal

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.roofline import peak_flops
from stagewright.planner.documents.cluster import Cluster, LinkLevel
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.planned_devices import base_bytes
from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.stage_table import ranges_of
from stagewright.planner.search.layer_costs import Configuration, layer_costs
from stagewright.planner.search.pipeline_costs import line_at

Floats = npt.NDArray[np.float64]
Allocation = Literal["node", "equal", "hybrid"]

MOST_GPUS = 8


@dataclass(frozen=True)
class MixedGpu:
    """A GPU by its type, its speed relative to the profile's device, and its memory."""

    kind: str
    speed: float
    memory_bytes: float


@dataclass(frozen=True, eq=False)
class ChainCosts:
    """A chain of L layers for one minibatch on the profile's device.

    Parameters
    ----------
    time_s : [L], forward and backward.
    state_bytes, kept_bytes : [L], states, and activations of one minibatch.
    hop_s : [L - 1], the message over each cut, both ways together.
    """

    time_s: Floats
    state_bytes: Floats
    kept_bytes: Floats
    hop_s: Floats


@dataclass(frozen=True)
class WorkerPlan:
    """One virtual worker: its GPUs in pipeline order, the bounds of their layers, minibatches in flight, and its rate.

    Parameters
    ----------
    minibatch_s : seconds between two minibatches that leave the pipeline, without synchronisation.
    """

    gpus: tuple[MixedGpu, ...]
    bounds: tuple[int, ...]
    in_flight: int
    minibatch_s: float

    @property
    def wave_s(self) -> float:
        """Seconds of a wave of `in_flight` minibatches."""
        return self.in_flight * self.minibatch_s


def chain_costs(profile: ModelProfile, cluster: Cluster, job: TrainingJob) -> ChainCosts:
    """Return the model's chain for minibatches of the job's global batch, on devices of the cluster's first group.

    A cut sends over the cluster's slowest link, which is how HetPipe's workers reach over nodes. Raises InvalidArgument for a
    model that is no chain.
    """
    if not profile.is_chain:
        raise InvalidArgument(
            f"{profile.name} is no chain of layers", field="model", hint="HetPipe cuts chains; take `stagewright plan`"
        )
    costs = layer_costs(CostModel(profile, cluster, job), Configuration(Degrees(), 1, job.global_batch, 1))
    link = _slowest_link(cluster)
    hop_s = 2 * np.array([line_at(link, size).seconds(size) for size in costs.cut_bytes[1:-1].tolist()])
    return ChainCosts(costs.time_s, costs.static_bytes, costs.kept_bytes[0], hop_s)


def nodes_of(profile: ModelProfile, cluster: Cluster, job: TrainingJob) -> list[list[MixedGpu]]:
    """Return the GPUs of each node, their speed relative to the first group's at the job's precision."""
    first = peak_flops(cluster.groups[0].device, job.precision)
    nodes: list[list[MixedGpu]] = []
    for group in cluster.groups:
        device = group.device
        room = device.memory_bytes * (1.0 - job.space.memory_headroom) - base_bytes(profile, device)
        gpu = MixedGpu(device.name, peak_flops(device, job.precision) / first, room)
        nodes += [[gpu] * group.devices_per_node for _ in range(group.num_nodes)]
    return nodes


def push_pull_s(profile: ModelProfile, cluster: Cluster, job: TrainingJob) -> float:
    """Return what pushing the sum of a wave and pulling the weights costs a worker over the slowest link."""
    optimizer, link = job.optimizer, _slowest_link(cluster)
    sizes = (
        profile.num_parameters * optimizer.gradient_bytes,
        profile.num_parameters * optimizer.parameter_bytes,
    )
    return sum(line_at(link, size).seconds(size) for size in sizes)


def _slowest_link(cluster: Cluster) -> LinkLevel:
    links = [group.links[-1] for group in cluster.groups]
    return cluster.between_groups or min(links, key=lambda link: link.bytes_per_s)


def allocate(nodes: Sequence[Sequence[MixedGpu]], policy: Allocation) -> tuple[tuple[MixedGpu, ...], ...]:
    """Return the virtual workers' GPUs.

    `node`: one worker a node. `equal`: worker i takes GPU i of every node. `hybrid`: nodes are sorted by speed and the
    fastest are paired with the slowest, half of the GPUs of both to each of two workers. Raises InvalidArgument where the
    nodes' sizes do not allow it.
    """
    sizes = {len(node) for node in nodes}
    if policy == "node":
        return tuple(tuple(node) for node in nodes)
    if len(sizes) != 1:
        raise InvalidArgument(
            f"nodes have {sorted(sizes)} GPUs, {policy} distribution needs equal nodes", field="nodes"
        )
    (size,) = sizes
    if policy == "equal":
        return tuple(tuple(node[index] for node in nodes) for index in range(size))
    if len(nodes) % 2 or size % 2:
        raise InvalidArgument(
            f"{len(nodes)} nodes of {size} GPUs cannot be paired and halved",
            field="nodes",
            hint="take `equal` or `node`",
        )
    ranked = sorted(nodes, key=lambda node: -sum(gpu.speed for gpu in node))
    half = size // 2
    workers: list[tuple[MixedGpu, ...]] = []
    for fast, slow in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
        workers += [(*fast[:half], *slow[:half]), (*fast[half:], *slow[half:])]
    return tuple(workers)


def partition(costs: ChainCosts, gpus: Sequence[MixedGpu], in_flight: int) -> WorkerPlan | None:
    """Return the best contiguous partition over all orders of the GPUs' types; None when nothing fits."""
    best: WorkerPlan | None = None
    for order in _orders(gpus):
        stages = np.stack([_stage_s(costs, gpu, min(in_flight, len(order) - k)) for k, gpu in enumerate(order)])
        found = least_bottleneck(stages, len(order))
        if found is None:
            continue
        total = sum(float(stages[k, a, b]) for k, (a, b) in enumerate(pairwise(found.bounds)))
        seconds = max(found.value, total / in_flight)
        if best is None or seconds < best.minibatch_s:
            best = WorkerPlan(order, found.bounds, in_flight, seconds)
    return best


def plan_worker(costs: ChainCosts, gpus: Sequence[MixedGpu]) -> WorkerPlan:
    """Return the partition and Nm of least time a minibatch.

    Raises InvalidArgument for more than MOST_GPUS, whose orders are too many, and Infeasible when not even Nm = 1 fits.
    """
    if len(gpus) > MOST_GPUS:
        raise InvalidArgument(
            f"a virtual worker has {len(gpus)} GPUs, their orders are enumerated up to {MOST_GPUS}",
            field="policy",
            hint="take `equal`, or describe smaller nodes",
        )
    found: WorkerPlan | None = None
    for in_flight in range(1, len(gpus) + 1):
        here = partition(costs, gpus, in_flight)
        if here is None:
            break
        if found is None or here.minibatch_s < found.minibatch_s * (1 - 1e-12):
            found = here
    if found is None:
        memory = sum(gpu.memory_bytes for gpu in gpus)
        raise Infeasible(
            f"the model's {costs.state_bytes.sum():.4g} bytes of states and {costs.kept_bytes.sum():.4g} of one minibatch "
            f"fit no partition over {len(gpus)} GPUs of {memory:.4g} bytes together",
            field="memory_bytes",
            hint="give a worker more GPUs, or a smaller minibatch",
        )
    return found


def samples_per_s(workers: Sequence[WorkerPlan], minibatch: int, push_pull_s: Sequence[float]) -> float:
    """Return the samples a second of all workers together: each runs at the rate of the slowest, whatever D is.

    `push_pull_s` is what pushing a wave's sum and pulling the weights costs each worker, once a wave; a minibatch pays its
    share of it. Workers' waves hold their own Nm minibatches.
    """
    waves = [worker.wave_s + extra for worker, extra in zip(workers, push_pull_s, strict=True)]
    return sum(worker.in_flight for worker in workers) * minibatch / max(waves)


def wave_ends(wave_s: Sequence[float], num_waves: int, distance: int) -> Floats:
    """Return when each worker pushes each wave under clock distance D, [waves, workers].

    end(c, v) = max( end(c - 1, v),  max over u of end(c - 1 - D, u) ) + wave_s(v)
    """
    ends = np.zeros((num_waves, len(wave_s)))
    for wave in range(num_waves):
        own = ends[wave - 1] if wave else np.zeros(len(wave_s))
        slowest = float(ends[wave - 1 - distance].max()) if wave - 1 - distance >= 0 else 0.0
        ends[wave] = np.maximum(own, slowest) + np.asarray(wave_s)
    return ends


def most_missing(in_flight: int, distance: int) -> int:
    """Return s_global, the most updates of another worker that a minibatch misses."""
    local = in_flight - 1
    return (distance + 1) * (local + 1) + local - 1


def missing_updates(minibatch: int, in_flight: int, distance: int) -> int:
    """Return how many earlier minibatches of a worker as late as allowed are not in what a minibatch computes on.

    Minibatch p starts when p - Nm has ended. The last pull before it follows the last wave c of its own worker that has
    ended by then, and holds the other's waves up to c - D. The minibatch that starts as a wave ends starts behind its pull.
    """
    ended = minibatch - in_flight  # this one and all before it have ended
    wave = (ended + 1) // in_flight - 1
    held = max(0, wave - distance + 1) * in_flight
    return max(0, minibatch - held)


def _orders(gpus: Sequence[MixedGpu]) -> Iterator[tuple[MixedGpu, ...]]:
    """Yield the orders of the GPUs that differ, each once."""
    ranked = sorted(gpus, key=lambda gpu: (gpu.kind, gpu.speed, gpu.memory_bytes))
    yield from dict.fromkeys(permutations(ranked))


def _stage_s(costs: ChainCosts, gpu: MixedGpu, in_flight: int) -> Floats:
    """Return the seconds of every range on a GPU, [L + 1, L + 1]; infinite where it does not fit."""
    seconds = ranges_of(costs.time_s) / gpu.speed
    seconds[1:-1, :] += costs.hop_s[:, None]
    held = ranges_of(costs.state_bytes) + in_flight * ranges_of(costs.kept_bytes)
    return np.asarray(np.where(held <= gpu.memory_bytes * (1 + 1e-12), seconds, np.inf))
