"""Our solvers under other planners' own objectives, on their own profile files.

Usage: python benchmarks/peers.py MODEL FILE [options] --json, MODEL one of pipedream, dnn-partitioning, piper, dapple.

    pipedream        --workers N [M] --bandwidth B [B2] [--count-activations] [--memory-bytes X]
    dnn-partitioning [--accelerators K] [--cpus L] [--noncontiguous] [--time-limit S]
    piper            [--devices K] [--memory-bytes X] [--microbatches N] [--bandwidth B] [--layers L]
    dapple           --global-batch B --machines 8 8 [--profile-batch P]

The document: objective (seconds; milliseconds for dnn-partitioning, as its files are), stages with the file's node ids,
status, bound, and the CPU seconds from parsed file to answer. Compiled code is loaded before the clock starts, by
solving a tiny problem of the same kind.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stagewright.formats.dnn_partitioning import PartitionProblem, read_partition_problem
from stagewright.formats.pipedream_graph import Graph, GraphNode, parse_graph
from stagewright.formats.piper import PiperConfiguration, PiperEdge, PiperNode, PiperProblem, read_piper_problem
from stagewright.planner.errors import InvalidArgument, StagewrightError
from stagewright.planner.planners.dapple_published import BatchGraph, dapple_partition
from stagewright.planner.planners.pipedream import PipelineGraph, pipedream_partition
from stagewright.planner.planners.piper import TensorGraph, piper_partition
from stagewright.planner.planners.tarnawski_dp import DeviceProblem, partition_any, partition_contiguous
from stagewright.planner.search.ideals import IdealLattice, ideal_lattice

REPEATED_LAYER = "ParallelTransformerLayer"
GIB = 2.0**30


def main(arguments: Sequence[str]) -> int:
    """Solve and print one JSON document; what is wrong goes to stderr, with exit code 2 (input) or 3 (infeasible)."""
    options = _parser().parse_args(arguments)
    try:
        document = _SOLVERS[options.model](options)
    except StagewrightError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(document, indent=None if options.json else 1))
    return 0


def _pipedream(options: argparse.Namespace) -> dict[str, object]:
    nodes, lattice, edges = _graph_parts(_read_graph(options.file))
    tiny = PipelineGraph.of(ideal_lattice(2, [(0, 1)]), [1.0, 1.0], [1.0, 1.0], [1.0, 1.0])
    keywords = {"count_activations": options.count_activations, "memory_bytes": options.memory_bytes}
    workers, bandwidth = options.workers or [4], options.bandwidth or [1e9]
    pipedream_partition(tiny, workers=[2] * len(workers), bytes_per_s=bandwidth, **keywords | {"memory_bytes": None})
    started = time.process_time()
    lattice = ideal_lattice(len(nodes), edges)
    graph = PipelineGraph.of(
        lattice,
        [(node.forward_ms + node.backward_ms) / 1e3 for node in nodes],
        [node.parameter_bytes for node in nodes],
        [sum(node.activation_bytes) for node in nodes],
    )
    found = pipedream_partition(graph, workers=workers, bytes_per_s=bandwidth, **keywords)
    cpu_s = time.process_time() - started
    stages = [
        _stage(_between(lattice, stage.first_ideal, stage.last_ideal, nodes), replicas=stage.replicas)
        for stage in found.stages
    ]
    return _document(found.bottleneck_s, found.bottleneck_s, stages, cpu_s)


def _dnn_partitioning(options: argparse.Namespace) -> dict[str, object]:
    problem = read_partition_problem(options.file)
    groups = problem.groups()
    tiny = ideal_lattice(1, [])
    partition_contiguous(_device_problem(PartitionProblem(**_TINY_PARTITION), 1, 1), tiny)
    started = time.process_time()
    accelerators = problem.num_accelerators if options.accelerators is None else options.accelerators
    cpus = problem.num_cpus if options.cpus is None else options.cpus
    devices = _device_problem(problem, accelerators, cpus)
    lattice = ideal_lattice(len(groups), _forward_edges(problem))
    found = partition_contiguous(devices, lattice)
    if options.noncontiguous:
        found = partition_any(devices, found, time_limit_s=options.time_limit)
    cpu_s = time.process_time() - started
    stages = []
    for kind, members in found.devices:
        ids = sorted(node.id for group in members for node in groups[group])
        stages.append({**_stage(ids), "device": kind})
    return _document(found.max_load_s, found.bound_s, stages, cpu_s)


def _piper(options: argparse.Namespace) -> dict[str, object]:
    problem = read_piper_problem(options.file)
    if options.layers is not None:
        problem = with_layers(problem, options.layers)
    memory = problem.memory_bytes if options.memory_bytes is None else options.memory_bytes
    bandwidth = problem.bandwidth if not options.bandwidth else options.bandwidth[0]
    devices = options.devices or problem.num_devices
    microbatches = options.microbatches or problem.num_microbatches
    tiny = _tensor_graph(_TINY_PIPER)
    piper_partition(
        tiny, ideal_lattice(2, [(0, 1)]), num_devices=2, memory_bytes=1e12, num_microbatches=2, bytes_per_s=1e9
    )
    started = time.process_time()
    graph = _tensor_graph(problem)
    edges = list(zip(graph.edge_from.tolist(), graph.edge_to.tolist(), strict=True))
    lattice = ideal_lattice(len(problem.nodes), edges)
    found = piper_partition(
        graph, lattice, num_devices=devices, memory_bytes=memory, num_microbatches=microbatches, bytes_per_s=bandwidth
    )
    cpu_s = time.process_time() - started
    ids = [node.id for node in problem.nodes]
    stages = [
        _stage(
            [ids[node] for node in stage.nodes],
            replicas=stage.data_parallel,
            tensor=stage.tensor_parallel,
            recompute=[ids[node] for node in stage.recompute],
        )
        for stage in found.stages
    ]
    return _document(found.bottleneck_s, found.bottleneck_s, stages, cpu_s)


def _dapple(options: argparse.Namespace) -> dict[str, object]:
    if options.global_batch is None or not options.machines:
        raise InvalidArgument("dapple needs --global-batch and --machines", field="machines")
    profile_batch = options.profile_batch or _batch_in_name(options.file)
    nodes, _, edges = _graph_parts(_read_graph(options.file))
    started = time.process_time()
    lattice = ideal_lattice(len(nodes), edges)
    factor = options.global_batch / profile_batch
    sums = PipelineGraph.of(
        lattice,
        [(node.forward_ms + node.backward_ms) / 1e3 * factor for node in nodes],
        [node.parameter_bytes for node in nodes],
        [sum(node.activation_bytes) * factor for node in nodes],
    )
    graph = BatchGraph(sums.compute_s, sums.parameter_bytes, sums.boundary_bytes, sums.nested, options.global_batch)
    found = dapple_partition(graph, options.machines)
    cpu_s = time.process_time() - started
    stages = [
        {
            **_stage(_between(lattice, stage.first_ideal, stage.last_ideal, nodes), replicas=sum(stage.allocation)),
            "allocation": list(stage.allocation),
        }
        for stage in found.stages
    ]
    document = _document(found.iteration_s, found.iteration_s, stages, cpu_s)
    return {**document, "speedup": graph.total_s / found.iteration_s, "replication": found.replication}


_SOLVERS = {"pipedream": _pipedream, "dnn-partitioning": _dnn_partitioning, "piper": _piper, "dapple": _dapple}


def _document(objective: float, bound: float, stages: list[dict[str, object]], cpu_s: float) -> dict[str, object]:
    status = "optimal" if objective <= bound * (1 + 1e-6) else "feasible"
    return {"objective": objective, "stages": stages, "status": status, "bound": bound, "cpu_s": cpu_s}


def _stage(
    nodes: Sequence[int | str], *, replicas: int = 1, tensor: int = 1, recompute: Sequence[int | str] = ()
) -> dict[str, object]:
    return {"nodes": list(nodes), "replicas": replicas, "tensor": tensor, "recompute": list(recompute)}


def _between(lattice: IdealLattice, first: int, last: int, nodes: Sequence[GraphNode]) -> list[str]:
    return [nodes[index].name for index in np.flatnonzero(lattice.members[last] & ~lattice.members[first])]


def _read_graph(path: str) -> Graph:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: cannot be read: {error}", field="file") from error
    return parse_graph(text, source=path)


def _graph_parts(graph: Graph) -> tuple[list[GraphNode], IdealLattice, list[tuple[int, int]]]:
    """Return the nodes that are placed (inputs and unused sinks are not), their lattice and edges by position."""
    sources = {first for first, _ in graph.edges}
    targets = {second for _, second in graph.edges}
    dropped = {
        node.name
        for node in graph.nodes
        if (node.description.startswith("Input") and node.name not in targets)
        or (node.description.startswith("__getitem__") and node.name not in sources)
    }
    nodes = [node for node in graph.nodes if node.name not in dropped]
    position = {node.name: index for index, node in enumerate(nodes)}
    edges = [(position[a], position[b]) for a, b in graph.edges if a in position and b in position]
    return nodes, ideal_lattice(len(nodes), edges), edges


def _forward_edges(problem: PartitionProblem) -> list[tuple[int, int]]:
    """Return the edges between groups that forward nodes make."""
    position = {node.id: index for index, group in enumerate(problem.groups()) for node in group}
    backward = {node.id for node in problem.nodes if node.is_backward}
    pairs = {
        (position[edge.source], position[edge.target])
        for edge in problem.edges
        if edge.source not in backward and edge.target not in backward
    }
    return sorted(pair for pair in pairs if pair[0] != pair[1])


def _device_problem(problem: PartitionProblem, accelerators: int, cpus: int) -> DeviceProblem:
    groups = problem.groups()
    position = {node.id: index for index, group in enumerate(groups) for node in group}
    heads: dict[int, list[int]] = {}
    cost: dict[int, float] = {}
    for edge in problem.edges:
        heads.setdefault(edge.source, []).append(position[edge.target])
        cost[edge.source] = max(cost.get(edge.source, 0.0), edge.cost_ms)
    tails = sorted(heads)
    lengths = [len(heads[tail]) for tail in tails]
    return DeviceProblem(
        accelerator_s=np.array(
            [
                sum(node.accelerator_ms if node.supported_on_accelerator else np.inf for node in group)
                for group in groups
            ]
        ),
        cpu_s=np.array([sum(node.cpu_ms for node in group) for group in groups]),
        size_bytes=np.array([sum(node.size_bytes for node in group) for group in groups]),
        tail_group=np.array([position[tail] for tail in tails], dtype=np.int64),
        tail_cost_s=np.array([cost[tail] for tail in tails], dtype=np.float64),
        head_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        head_group=np.array([group for tail in tails for group in heads[tail]], dtype=np.int64),
        num_accelerators=accelerators,
        num_cpus=cpus,
        memory_bytes=problem.accelerator_memory_bytes,
    )


def _tensor_graph(problem: PiperProblem) -> TensorGraph:
    position = {node.id: index for index, node in enumerate(problem.nodes)}
    degrees = sorted({degree for node in problem.nodes for degree in node.configurations})
    shape = (len(degrees), 2, len(problem.nodes))
    time_s, static, stash = (np.full(shape, np.inf) for _ in range(3))
    weights = np.zeros((len(degrees), len(problem.nodes)))
    forward, backward = (np.zeros((len(degrees), 2, len(problem.edges))) for _ in range(2))
    for node in problem.nodes:
        index = position[node.id]
        incoming = [(k, edge.source) for k, edge in enumerate(problem.edges) if edge.target == node.id]
        outgoing = [(k, edge.target) for k, edge in enumerate(problem.edges) if edge.source == node.id]
        for degree, entries in node.configurations.items():
            row = degrees.index(degree)
            for entry in entries:
                level = int(entry.id != "vanilla")
                time_s[row, level, index] = entry.seconds_per_sample
                static[row, level, index] = entry.static_bytes
                stash[row, level, index] = entry.bytes_per_stash
                weights[row, index] = entry.parameter_bytes
                for k, other in incoming:
                    forward[row, level, k] = entry.forward_sync_bytes.get(other, 0.0)
                for k, other in outgoing:
                    backward[row, level, k] = entry.backward_sync_bytes.get(other, 0.0)
    return TensorGraph(
        np.array(degrees, dtype=np.int64),
        time_s,
        static,
        stash,
        weights,
        np.array([position[edge.source] for edge in problem.edges], dtype=np.int64),
        np.array([position[edge.target] for edge in problem.edges], dtype=np.int64),
        np.array([edge.bytes_per_sample for edge in problem.edges]),
        forward,
        backward,
    )


def with_layers(problem: PiperProblem, num_layers: int) -> PiperProblem:
    """Return the model with the middle transformer layer repeated, or middle ones dropped, until it has `num_layers`."""
    layers = [node.id for node in problem.nodes if node.name == REPEATED_LAYER]
    if len(layers) < 3 or num_layers < 2:
        raise InvalidArgument(f"{len(layers)} transformer layers cannot become {num_layers}", field="layers")
    while len(layers) != num_layers:
        middle = len(layers) // 2
        problem = _repeat(problem, layers, middle) if len(layers) < num_layers else _drop(problem, layers, middle)
        layers = [node.id for node in problem.nodes if node.name == REPEATED_LAYER]
    return problem


def _repeat(problem: PiperProblem, layers: Sequence[int], middle: int) -> PiperProblem:
    """Insert a copy of a layer behind it: side inputs go to both, the chain runs through the copy."""
    old, before, after = layers[middle], layers[middle - 1], layers[middle + 1]
    new = max(node.id for node in problem.nodes) + 1
    nodes: list[PiperNode] = []
    for node in problem.nodes:
        if node.id == old:
            nodes.append(_renamed(node, forward={}, backward={after: new}))
            nodes.append(_renamed(node, forward={before: old}, backward={}).model_copy(update={"id": new}))
        elif node.id == after:
            nodes.append(_renamed(node, forward={old: new}, backward={}))
        else:
            nodes.append(_with_target(node, old, new))
    edges: list[PiperEdge] = []
    for edge in problem.edges:
        if (edge.source, edge.target) == (old, after):
            edges += [edge.model_copy(update={"target": new}), edge.model_copy(update={"source": new})]
        else:
            edges.append(edge)
            if edge.target == old and edge.source != before:
                edges.append(edge.model_copy(update={"target": new}))
    return problem.model_copy(update={"nodes": tuple(nodes), "edges": tuple(edges)})


def _drop(problem: PiperProblem, layers: Sequence[int], middle: int) -> PiperProblem:
    """Remove a layer and join its neighbours."""
    old, before, after = layers[middle], layers[middle - 1], layers[middle + 1]
    nodes = []
    for node in problem.nodes:
        if node.id == before:
            nodes.append(_renamed(node, forward={}, backward={old: after}))
        elif node.id == after:
            nodes.append(_renamed(node, forward={old: before}, backward={}))
        elif node.id != old:
            nodes.append(_renamed(node, forward={}, backward={old: None}))
    edges = []
    for edge in problem.edges:
        if (edge.source, edge.target) == (before, old):
            edges.append(edge.model_copy(update={"target": after}))
        elif old not in (edge.source, edge.target):
            edges.append(edge)
    return problem.model_copy(update={"nodes": tuple(nodes), "edges": tuple(edges)})


def _renamed(node: PiperNode, *, forward: dict[int, int | None], backward: dict[int, int | None]) -> PiperNode:
    """Return the node with the neighbours of its sync bytes renamed (None: removed)."""

    def rename(table: dict[int, float], names: dict[int, int | None]) -> dict[int, float]:
        moved = {names.get(key, key): value for key, value in table.items()}
        return {key: value for key, value in moved.items() if key is not None}

    return _mapped(
        node, lambda entry: (rename(entry.forward_sync_bytes, forward), rename(entry.backward_sync_bytes, backward))
    )


def _with_target(node: PiperNode, old: int, new: int) -> PiperNode:
    """Return a node that feeds `old` so that it feeds `new` alike."""

    def both(table: dict[int, float]) -> dict[int, float]:
        return {**table, new: table[old]} if old in table else table

    return _mapped(node, lambda entry: (entry.forward_sync_bytes, both(entry.backward_sync_bytes)))


def _mapped(node: PiperNode, change) -> PiperNode:  # noqa: ANN001
    def entry_of(entry: PiperConfiguration) -> PiperConfiguration:
        forward, backward = change(entry)
        return entry.model_copy(update={"forward_sync_bytes": forward, "backward_sync_bytes": backward})

    table = {degree: tuple(entry_of(entry) for entry in entries) for degree, entries in node.configurations.items()}
    return node.model_copy(update={"configurations": table})


def _batch_in_name(path: str) -> int:
    match = re.search(r"pbs-(\d+)", Path(path).name)
    if match is None:
        raise InvalidArgument(
            f"{path} does not name its profile batch (pbs-N)", field="profile_batch", hint="give --profile-batch"
        )
    return int(match[1])


def _entry(kind: str, neighbours: tuple[int, ...], outgoing: tuple[int, ...]) -> PiperConfiguration:
    return PiperConfiguration(
        id=kind,  # type: ignore[arg-type]
        seconds_per_sample=1.0,
        parameter_bytes=1.0,
        bytes_per_stash=1.0,
        static_bytes=1.0,
        forward_sync_bytes=dict.fromkeys(neighbours, 0.0),
        backward_sync_bytes=dict.fromkeys(outgoing, 0.0),
    )


_TINY_PIPER = PiperProblem(
    num_devices=2,
    memory_bytes=1e12,
    bandwidth=1e9,
    num_microbatches=2,
    nodes=(
        PiperNode(
            id=0, name="a", configurations={1: (_entry("vanilla", (), (1,)), _entry("activation recomp", (), (1,)))}
        ),
        PiperNode(
            id=1, name="b", configurations={1: (_entry("vanilla", (0,), ()), _entry("activation recomp", (0,), ()))}
        ),
    ),
    edges=(PiperEdge(source=0, target=1, bytes_per_sample=1.0),),
)
_TINY_PARTITION = {
    "maxSizePerFPGA": 1e9,
    "maxFPGAs": 1,
    "maxCPUs": 1,
    "nodes": [
        {
            "name": "a",
            "id": 0,
            "supportedOnFpga": 1,
            "cpuLatency": 1.0,
            "fpgaLatency": 1.0,
            "isBackwardNode": 0,
            "size": 1.0,
        },
    ],
    "edges": [],
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(_SOLVERS))
    parser.add_argument("file")
    parser.add_argument("--json", action="store_true", help="print the document on one line")
    parser.add_argument("--workers", type=int, nargs="+")
    parser.add_argument("--bandwidth", type=float, nargs="+")
    parser.add_argument("--count-activations", action="store_true")
    parser.add_argument("--memory-bytes", type=float)
    parser.add_argument("--accelerators", type=int)
    parser.add_argument("--cpus", type=int)
    parser.add_argument("--noncontiguous", action="store_true")
    parser.add_argument("--time-limit", type=float, default=600.0)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--global-batch", type=int)
    parser.add_argument("--machines", type=int, nargs="+")
    parser.add_argument("--profile-batch", type=int)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
