"""Planners under their published objectives: equal to brute force on tiny graphs, and to the published plans."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewright.planner.errors import Infeasible
from stagewright.planner.planners.dapple_published import BatchGraph, MachineStage, dapple_partition, iteration_s
from stagewright.planner.planners.pipedream import PipelineGraph, pipedream_partition
from stagewright.planner.planners.piper import TensorGraph, piper_partition
from stagewright.planner.planners.tarnawski_dp import (
    DeviceProblem,
    accelerator_load_s,
    partition_any,
    partition_contiguous,
)
from stagewright.planner.search.ideals import ideal_lattice

ROOT = Path(__file__).parents[3]


@st.composite
def dags(draw, most: int = 5):
    """A small DAG: nodes in topological order, edges forward, some path through all or not."""
    count = draw(st.integers(1, most))
    pairs = list(itertools.combinations(range(count), 2))
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return count, sorted(edges)


def numbers(count: int, low: float = 0.1, high: float = 9.0):
    return st.lists(st.floats(low, high).map(lambda value: round(value, 2)), min_size=count, max_size=count)


def chains_of_ideals(lattice):
    """Every way to walk from the empty ideal to the whole graph over nested ideals."""
    members = lattice.members
    last = lattice.num_ideals - 1

    def grow(path):
        if path[-1] == last:
            yield path
            return
        for ideal in range(path[-1] + 1, last + 1):
            if not (members[path[-1]] & ~members[ideal]).any():
                yield from grow([*path, ideal])

    return list(grow([0]))


@settings(max_examples=40)
@given(data=st.data())
def test_the_pipedream_programme_equals_exhaustive_search(data):
    count, edges = data.draw(dags())
    compute, weights, outputs = (data.draw(numbers(count)) for _ in range(3))
    workers = data.draw(st.integers(1, 4))
    counted = data.draw(st.booleans())
    lattice = ideal_lattice(count, edges)
    graph = PipelineGraph.of(lattice, compute, weights, outputs)
    best = math.inf
    for path in chains_of_ideals(lattice):
        stages = list(itertools.pairwise(path))
        for replicas in itertools.product(range(1, workers + 1), repeat=len(stages)):
            if sum(replicas) == workers:
                best = min(
                    best,
                    max(pipedream_stage(graph, a, b, m, counted) for (a, b), m in zip(stages, replicas, strict=True)),
                )
    found = pipedream_partition(graph, workers=[workers], bytes_per_s=[2.0], count_activations=counted)
    assert found.bottleneck_s == pytest.approx(best, rel=1e-12)


def pipedream_stage(graph: PipelineGraph, begin: int, end: int, replicas: int, counted: bool) -> float:
    work = graph.compute_s[end] - graph.compute_s[begin]
    size = graph.parameter_bytes[end] - graph.parameter_bytes[begin]
    terms = [(work + 4 * (replicas - 1) * size / (2.0 * replicas)) / replicas]
    if counted and begin:
        terms.append(2 * graph.boundary_bytes[begin] / (2.0 * replicas))
    if counted and end < len(graph.compute_s) - 1:
        terms.append(2 * graph.boundary_bytes[end] / (2.0 * replicas))
    return max(terms)


def test_two_levels_use_the_inner_optimum_as_compute():
    lattice = ideal_lattice(4, [(0, 1), (1, 2), (2, 3)])
    graph = PipelineGraph.of(lattice, [1.0, 1.0, 1.0, 1.0], [0.0] * 4, [0.0] * 4)
    assert pipedream_partition(graph, workers=[2, 2], bytes_per_s=[1e9, 1e9]).bottleneck_s == pytest.approx(1.0)


def test_memory_that_nothing_fits_is_infeasible():
    graph = PipelineGraph.of(ideal_lattice(1, []), [1.0], [10.0], [1.0])
    with pytest.raises(Infeasible):
        pipedream_partition(graph, workers=[1], bytes_per_s=[1.0], memory_bytes=1.0)


def device_problem(count, edges, work, cpu, size, cost, accelerators, cpus, memory=math.inf) -> DeviceProblem:
    tails = sorted({tail for tail, _ in edges})
    heads = [[head for tail, head in edges if tail == wanted] for wanted in tails]
    return DeviceProblem(
        np.array(work, dtype=float),
        np.array(cpu, dtype=float),
        np.array(size, dtype=float),
        np.array(tails, dtype=np.int64),
        np.array([cost[tail] for tail in tails], dtype=float),
        np.cumsum([0, *map(len, heads)]).astype(np.int64),
        np.array([head for group in heads for head in group], dtype=np.int64),
        accelerators,
        cpus,
        memory,
    )


def load_of(problem: DeviceProblem, members, kind: str) -> float:
    inside = np.zeros(len(problem.size_bytes), dtype=np.bool_)
    inside[list(members)] = True
    return accelerator_load_s(problem, inside) if kind == "accelerator" else float(problem.cpu_s[inside].sum())


@settings(max_examples=40)
@given(data=st.data())
def test_the_programme_over_ideals_equals_exhaustive_search(data):
    count, edges = data.draw(dags())
    work, cpu, size, cost = (data.draw(numbers(count)) for _ in range(4))
    accelerators, cpus = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1))
    problem = device_problem(count, edges, work, cpu, size, cost, accelerators, cpus)
    lattice = ideal_lattice(count, edges)
    best = math.inf
    for path in chains_of_ideals(lattice):
        sets = [np.flatnonzero(lattice.members[b] & ~lattice.members[a]).tolist() for a, b in itertools.pairwise(path)]
        for kinds in itertools.product(["accelerator", "cpu"], repeat=len(sets)):
            if kinds.count("accelerator") <= accelerators and kinds.count("cpu") <= cpus:
                best = min(
                    best, max(load_of(problem, members, kind) for members, kind in zip(sets, kinds, strict=True))
                )
    assert partition_contiguous(problem, lattice).max_load_s == pytest.approx(best, rel=1e-12)


@settings(max_examples=8)
@given(data=st.data())
def test_the_integer_programme_equals_every_assignment(data):
    count, edges = data.draw(dags(4))
    work, cpu, size, cost = (data.draw(numbers(count)) for _ in range(4))
    problem = device_problem(count, edges, work, cpu, size, cost, 2, 1)
    kinds = ["accelerator", "accelerator", "cpu"]
    best = min(
        max(load_of(problem, [v for v in range(count) if devices[v] == i], kind) for i, kind in enumerate(kinds))
        for devices in itertools.product(range(3), repeat=count)
    )
    found = partition_any(problem, partition_contiguous(problem, ideal_lattice(count, edges)))
    assert found.max_load_s == pytest.approx(best, rel=1e-6)
    assert found.is_optimal


def test_a_chain_of_1_to_6_on_three_devices_takes_9_contiguous_and_7_in_any_sets():
    edges = [(index, index + 1) for index in range(5)]
    work = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    problem = device_problem(6, edges, work, work, [0.0] * 6, [0.0] * 6, 3, 0)
    contiguous = partition_contiguous(problem, ideal_lattice(6, edges))
    assert contiguous.max_load_s == 9.0
    assert partition_any(problem, contiguous).max_load_s == pytest.approx(7.0)


@settings(max_examples=25)
@given(data=st.data())
def test_the_piper_programme_equals_exhaustive_search(data):
    count, edges = data.draw(dags(4))
    plain, extra, stash, saved, weights = (data.draw(numbers(count)) for _ in range(5))
    boundary = data.draw(numbers(len(edges)))
    memory = data.draw(st.floats(4.0, 60.0))
    devices = data.draw(st.integers(1, 4))
    time_s = np.array([[plain, [p + e for p, e in zip(plain, extra, strict=True)]]])
    stashes = np.array([[stash, [max(a - b, 0.0) for a, b in zip(stash, saved, strict=True)]]])
    zeros = np.zeros((1, 2, len(edges)))
    graph = TensorGraph(
        np.array([1]),
        time_s,
        np.zeros((1, 2, count)),
        stashes,
        np.array([weights]),
        np.array([a for a, _ in edges], dtype=np.int64),
        np.array([b for _, b in edges], dtype=np.int64),
        np.array(boundary, dtype=float),
        zeros,
        zeros,
    )
    lattice = ideal_lattice(count, edges)
    best = exhaustive_piper(graph, lattice, devices, memory)
    if best == math.inf:
        with pytest.raises(Infeasible):
            piper_partition(
                graph, lattice, num_devices=devices, memory_bytes=memory, num_microbatches=4, bytes_per_s=3.0
            )
        return
    found = piper_partition(
        graph, lattice, num_devices=devices, memory_bytes=memory, num_microbatches=4, bytes_per_s=3.0
    )
    assert found.bottleneck_s == pytest.approx(best, rel=1e-9)


def exhaustive_piper(graph: TensorGraph, lattice, devices: int, memory: float) -> float:
    best = math.inf
    for path in chains_of_ideals(lattice):
        stages = list(itertools.pairwise(path))
        for degrees in itertools.product([1, 2, 4], repeat=len(stages)):
            if sum(degrees) <= devices:
                times = [
                    piper_stage(graph, lattice, stage, degrees[k], sum(degrees[k:]), memory)
                    for k, stage in enumerate(stages)
                ]
                best = min(best, max(times))
    return best


def piper_stage(graph: TensorGraph, lattice, stage, data: int, later: int, memory: float) -> float:
    inside = lattice.members[stage[1]] & ~lattice.members[stage[0]]
    nodes = np.flatnonzero(inside)
    stashes = -(-later // data)
    crossing = inside[graph.edge_from] != inside[graph.edge_to] if len(graph.edge_from) else np.zeros(0, dtype=bool)
    moved = float((2 * graph.edge_bytes[crossing]).sum()) / data
    sync = 4 * (data - 1) / data * float(graph.weight_bytes[0, nodes].sum()) / 4
    best = math.inf
    for levels in itertools.product([0, 1], repeat=len(nodes)):
        if float(graph.stash_bytes[0, list(levels), nodes].sum()) * stashes <= memory:
            best = min(best, float(graph.time_s[0, list(levels), nodes].sum()) / data + (moved + sync) / 3.0)
    return best


@settings(max_examples=25)
@given(data=st.data())
def test_the_dapple_search_equals_exhaustive_search(data):
    count = data.draw(st.integers(1, 3))
    edges = [(index, index + 1) for index in range(count - 1)]
    compute = data.draw(numbers(count))
    weights, outputs = (data.draw(numbers(count, 1e8, 9e9)) for _ in range(2))
    machines = data.draw(st.sampled_from([(2, 2), (3,), (1, 1, 1)]))
    lattice = ideal_lattice(count, edges)
    sums = PipelineGraph.of(lattice, compute, weights, outputs)
    graph = BatchGraph(sums.compute_s, sums.parameter_bytes, sums.boundary_bytes, sums.nested, 8)
    best = math.inf
    for replication in [rp for rp in range(1, sum(machines) + 1) if sum(machines) % rp == 0]:
        for path in chains_of_ideals(lattice):
            for stages in allocations(list(itertools.pairwise(path)), machines, replication):
                best = min(best, iteration_s(graph, stages, replication))
    found = dapple_partition(graph, machines)
    assert found.iteration_s == pytest.approx(best, rel=1e-9)
    assert found.iteration_s == pytest.approx(iteration_s(graph, found.stages, found.replication), rel=1e-12)


def allocations(stages, machines, replication):
    if not stages:
        if not any(machines):
            yield ()
        return
    for taken in itertools.product(*(range(size + 1) for size in machines)):
        if sum(taken) and sum(taken) % replication == 0:
            left = tuple(size - used for size, used in zip(machines, taken, strict=True))
            for rest in allocations(stages[1:], left, replication):
                yield (MachineStage(*stages[0], taken), *rest)


PUBLISHED = [
    ("pipedream", "pipedream/vgg16.graph.txt", "--workers 4 --bandwidth 1e9", 0.175733),
    ("pipedream", "pipedream/vgg16.graph.txt", "--workers 4 --bandwidth 1e9 --count-activations", 0.205521),
    ("pipedream", "pipedream/vgg16.graph.txt", "--workers 16 --bandwidth 3.125e9 --count-activations", 0.045525),
    ("pipedream", "pipedream/resnet50.graph.txt", "--workers 16 --bandwidth 1.25e9 --count-activations", 0.043848),
    ("pipedream", "pipedream/gnmt.graph.txt", "--workers 16 --bandwidth 1.25e9 --count-activations", 0.017125),
    ("dnn-partitioning", "dnn-partitioning/layer_bert24_training.json", "", 41.7458),
    ("dnn-partitioning", "dnn-partitioning/layer_resnet50_training.json", "", 78.6318),
    ("dnn-partitioning", "dnn-partitioning/operator_bert_l-3_inference.json", "--noncontiguous", 21.9084),
    (
        "piper",
        "piper/bert32a100.json",
        "--devices 64 --memory-bytes 8589934592 --microbatches 1920 --bandwidth 26843545600",
        0.0202006,
    ),
    (
        "piper",
        "piper/bert32a100.json",
        "--devices 1024 --memory-bytes 8589934592 --microbatches 512 --bandwidth 26843545600",
        0.00192211,
    ),
    ("dapple", "dapple/vgg-19-pbs-32.txt", "--global-batch 2048 --machines 8 8", 9.22932 / 14.6955),
    ("dapple", "dapple/bert-48-pbs-2.txt", "--global-batch 64 --machines 8 8", 11.000224 / 13.7196),
]


@pytest.mark.parametrize(("model", "file", "options", "published"), PUBLISHED, ids=lambda value: str(value)[:40])
def test_published_objectives_are_reached_or_bettered(peer_profiles, model, file, options, published):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "peers.py"),
        model,
        str(peer_profiles / file),
        *options.split(),
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    document = json.loads(result.stdout)
    assert document["objective"] <= published * (1 + 1e-5)
    assert document["status"] == "optimal"
    if model != "dapple":
        assert document["objective"] == pytest.approx(published, rel=1e-5)
