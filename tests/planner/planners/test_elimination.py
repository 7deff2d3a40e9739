"""OptCNN and TensorOpt: elimination and frontiers against every assignment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stagewright.planner.planners.optcnn import ConfigurationGraph, frontier
from stagewright.planner.planners.tensoropt import chain_frontier

FORK_JOIN = ((0, 1), (1, 2), (1, 3), (2, 4), (3, 4), (4, 5))


def random_graph(seed: int, edges, nodes: int, strategies: int, *, bytes_too: bool) -> ConfigurationGraph:
    draw = np.random.default_rng(seed)
    costs = tuple(
        tuple(
            (float(draw.integers(1, 20)) if bytes_too else 0.0, float(draw.integers(1, 20))) for _ in range(strategies)
        )
        for _ in range(nodes)
    )
    tables = tuple(
        (u, v, tuple(tuple(row) for row in draw.integers(0, 10, (strategies, strategies)).astype(float).tolist()))
        for u, v in edges
    )
    return ConfigurationGraph(costs, tables)


def everything(graph: ConfigurationGraph) -> list[tuple[float, float, tuple[int, ...]]]:
    found = []
    for choice in itertools.product(*(range(len(node)) for node in graph.nodes)):
        size = sum(node[c][0] for node, c in zip(graph.nodes, choice, strict=True))
        seconds = sum(node[c][1] for node, c in zip(graph.nodes, choice, strict=True))
        seconds += sum(table[choice[u]][choice[v]] for u, v, table in graph.edges)
        found.append((size, seconds, choice))
    return found


def pareto_set(points) -> list[tuple[float, float]]:
    kept: list[tuple[float, float]] = []
    for size, seconds, _ in sorted(points):
        if not kept or seconds < kept[-1][1]:
            kept.append((size, seconds))
    return kept


@pytest.mark.parametrize("seed", range(10))
def test_elimination_equals_every_assignment_on_six_nodes_with_a_fork_and_a_join(seed):
    graph = random_graph(seed, FORK_JOIN, 6, 3, bytes_too=False)
    (best,) = frontier(graph)
    points = everything(graph)
    assert best.seconds == min(seconds for _, seconds, _ in points)
    chosen = tuple(c for _, c in best.chosen)
    assert next(seconds for _, seconds, choice in points if choice == chosen) == best.seconds


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("edges", [FORK_JOIN, ((0, 1), (0, 1), (1, 2), (2, 3), (0, 3))])
def test_the_frontier_of_a_graph_is_the_pareto_set_of_every_assignment(seed, edges):
    graph = random_graph(seed, edges, 1 + max(v for _, v in edges), 3, bytes_too=True)
    assert [(point.size_bytes, point.seconds) for point in frontier(graph)] == pareto_set(everything(graph))


@pytest.mark.parametrize("seed", range(10))
def test_the_frontier_of_a_chain_of_six_operators_with_four_strategies_is_the_pareto_set(seed):
    graph = random_graph(seed, tuple((i, i + 1) for i in range(5)), 6, 4, bytes_too=True)
    found = chain_frontier(graph.nodes, tuple(table for _, _, table in graph.edges))
    assert [(point.size_bytes, point.seconds) for point in found] == pareto_set(everything(graph))
    assert all(len(point.chosen) == 6 for point in found)
