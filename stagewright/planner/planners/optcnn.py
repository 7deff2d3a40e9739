"""OptCNN (Jia et al., ICML 2018): a configuration for each layer, exact by eliminating nodes and edges of the graph.

    cost = sum_v t_C(v, c_v) + t_S(v, c_v)  +  sum_(u,v) t_X((u, v), c_u, c_v)

    node elimination   w with one edge in and one out:  t_X'(c_u, c_v) = min over c_w of t(w, c_w) + t_X(u, w) + t_X(w, v)
    edge elimination   parallel edges add up

until K nodes are left (2 for most networks), whose configurations are enumerated: O(E C^3 + K C^K). Exact for this cost,
the sequential execution of all layers on all devices; no pipeline, no overlap, no memory. Entries here are Pareto sets of
(bytes, seconds), which is what TensorOpt tracks; with all bytes 0 a set is one number.

On the common Problem layers of a stage share their degrees, so on one stage the planner picks one (dp, tp) for all layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.search.problem import Partition


class Point(NamedTuple):
    """Bytes and seconds of part of a graph, and the configuration of each node of it that is settled."""

    size_bytes: float
    seconds: float
    chosen: tuple[tuple[int, int], ...] = ()


Frontier = tuple[Point, ...]
Table = tuple[tuple[Frontier, ...], ...]


@dataclass(frozen=True)
class ConfigurationGraph:
    """Layers with costs by configuration, and edges with costs by both ends' configurations.

    Parameters
    ----------
    nodes : for each node, (bytes, seconds) of each configuration.
    edges : (u, v, seconds[c_u][c_v]).
    """

    nodes: tuple[tuple[tuple[float, float], ...], ...]
    edges: tuple[tuple[int, int, tuple[tuple[float, ...], ...]], ...]


def pareto(points: Sequence[Point]) -> Frontier:
    """Return the points that no other one beats in bytes and seconds, by bytes."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point.seconds < kept[-1].seconds:
            kept.append(point)
    return tuple(kept)


def joined(*parts: Frontier) -> Frontier:
    """Return the sums of one point of each part that no other sum beats."""
    total: Frontier = (Point(0.0, 0.0),)
    for part in parts:
        total = pareto(
            [
                Point(a.size_bytes + b.size_bytes, a.seconds + b.seconds, a.chosen + b.chosen)
                for a in total
                for b in part
            ]
        )
    return total


def frontier(graph: ConfigurationGraph) -> Frontier:
    """Return the Pareto set over all configurations of all nodes, each point with every node's configuration."""
    nodes: dict[int, tuple[Frontier, ...]] = {
        node: tuple((Point(size, seconds, ((node, index),)),) for index, (size, seconds) in enumerate(costs))
        for node, costs in enumerate(graph.nodes)
    }
    edges: dict[tuple[int, int], Table] = {}
    for u, v, seconds in graph.edges:
        direct: Table = tuple(tuple((Point(0.0, value),) for value in row) for row in seconds)
        edges[u, v] = _summed(edges.get((u, v)), direct)
    while (node := _removable(nodes, edges)) is not None:
        (before,) = [u for u, v in edges if v == node]
        (after,) = [v for u, v in edges if u == node]
        into, out, own = edges.pop((before, node)), edges.pop((node, after)), nodes.pop(node)
        table: Table = tuple(
            tuple(
                pareto([p for c, cost in enumerate(own) for p in joined(into[a][c], cost, out[c][b])])
                for b in range(len(nodes[after]))
            )
            for a in range(len(nodes[before]))
        )
        edges[before, after] = _summed(edges.get((before, after)), table)
    left = sorted(nodes)
    points: list[Point] = []
    for choice in itertools.product(*(range(len(nodes[node])) for node in left)):
        at = dict(zip(left, choice, strict=True))
        parts = [nodes[node][at[node]] for node in left]
        parts += [table[at[u]][at[v]] for (u, v), table in sorted(edges.items())]
        points += joined(*parts)
    return tuple(point._replace(chosen=tuple(sorted(point.chosen))) for point in pareto(points))


def _summed(first: Table | None, second: Table) -> Table:
    if first is None:
        return second
    return tuple(tuple(joined(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(first, second, strict=True))


def _removable(nodes: dict[int, tuple[Frontier, ...]], edges: dict[tuple[int, int], Table]) -> int | None:
    """Return the first node with exactly one edge in and one edge out."""
    for node in sorted(nodes):
        if sum(v == node for _, v in edges) == 1 and sum(u == node for u, _ in edges) == 1:
            return node
    return None


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    sequential = table.num_microbatches * float(table.time_s[0, -1]) + float(table.reduction_s[0, -1])
    yield sequential, table.partition((0, table.num_layers))


PLANNER = table_planner(
    "optcnn",
    "Jia et al., Exploring Hidden Dimensions in Accelerating Convolutional Neural Networks, ICML 2018",
    _solve_one,
    reach=Reach(pipeline=False, tensor=True),
    objective="compute, synchronisation and transfers in sequence, seconds",
)
