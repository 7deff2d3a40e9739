"""PipeDream's profile, `graph.txt` (DAPPLE's is the same): nodes with times and sizes, and the edges between them.

A line is either a node, `id -- description -- forward_compute_time=ms, backward_compute_time=ms,
activation_size=bytes (or [a; b]), parameter_size=bytes`, or an edge, a tab and `id -- id`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import networkx as nx

from stagewright.planner.documents import (
    ConfigurationCost,
    Edge,
    LayerClass,
    LayerRun,
    ModelProfile,
    Pedigree,
    Recompute,
    Source,
)
from stagewright.planner.errors import InvalidDocument

FLOAT_BYTES = 4
SLOWEST_PLAUSIBLE_S = 3600.0

_NODE = re.compile(r"^(?P<id>\S+) -- (?P<description>.*?) -- (?P<fields>forward_compute_time=.*)$")
_EDGE = re.compile(r"^\t(?P<source>\S+) -- (?P<target>\S+)$")
_FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")


@dataclass(frozen=True)
class GraphNode:
    """One node: milliseconds for a minibatch, and bytes; `activation_bytes` has one value for each output."""

    name: str
    description: str
    forward_ms: float
    backward_ms: float
    activation_bytes: tuple[float, ...]
    parameter_bytes: float


@dataclass(frozen=True)
class Graph:
    """Nodes in file order and edges as pairs of node names."""

    nodes: tuple[GraphNode, ...]
    edges: tuple[tuple[str, str], ...]

    def topological_names(self) -> tuple[str, ...]:
        """Return node names in a topological order that follows the numbers in the names where it is free to."""
        graph = nx.DiGraph(self.edges)
        graph.add_nodes_from(node.name for node in self.nodes)
        return tuple(nx.lexicographical_topological_sort(graph, key=_natural))


def parse_graph(text: str, *, source: str = "graph.txt") -> Graph:
    """Return the graph in `text`; raises InvalidDocument with file, line and field for whatever does not fit."""
    nodes: dict[str, GraphNode] = {}
    edges: list[tuple[str, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if edge := _EDGE.match(line):
            edges.append((edge["source"], edge["target"]))
        elif node := _NODE.match(line):
            if node["id"] in nodes:
                raise InvalidDocument(f"{source}:{number}: node {node['id']} stands twice", field="id")
            nodes[node["id"]] = _node(node["id"], node["description"], node["fields"], f"{source}:{number}")
        else:
            raise InvalidDocument(
                f"{source}:{number}: neither a node nor an edge: {line.strip()[:80]!r}",
                field="line",
                hint="is the file cut off? a node line ends with parameter_size=..., an edge line is TAB id -- id",
            )
    if not nodes:
        raise InvalidDocument(f"{source}: holds no node", field="nodes")
    for first, second in edges:
        for name in (first, second):
            if name not in nodes:
                raise InvalidDocument(
                    f"{source}: edge {first} -- {second} names {name}, which is no node", field="edges"
                )
    graph = Graph(tuple(nodes.values()), tuple(edges))
    try:
        graph.topological_names()
    except nx.NetworkXUnfeasible as error:
        cycle = " -> ".join(first for first, _ in nx.find_cycle(nx.DiGraph(graph.edges)))
        raise InvalidDocument(f"{source}: edges form a cycle: {cycle}", field="edges") from error
    return graph


def graph_text(graph: Graph) -> str:
    """Return the file of a graph, as PipeDream's own writer prints it."""
    lines = []
    for node in graph.nodes:
        sizes = [f"{size:.3f}" if len(node.activation_bytes) == 1 else f"{size}" for size in node.activation_bytes]
        size = sizes[0] if len(sizes) == 1 else "[" + "; ".join(sizes) + "]"
        lines.append(
            f"{node.name} -- {node.description} -- forward_compute_time={node.forward_ms:.3f}, "
            f"backward_compute_time={node.backward_ms:.3f}, activation_size={size}, "
            f"parameter_size={node.parameter_bytes:.3f}"
        )
    lines += [f"\t{source} -- {target}" for source, target in graph.edges]
    return "\n".join(lines)


def profile_from_graph(
    graph: Graph, *, name: str, microbatch: int, dtype: Literal["fp32", "fp16"] = "fp32"
) -> ModelProfile:
    """Return the profile a graph holds: each node a layer, `microbatch` the minibatch it was measured with.

    The file has one backward time; a node with parameters gets half of it for each gradient, marked analytic.
    """
    by_name = {node.name: node for node in graph.nodes}
    order = graph.topological_names()
    classes = {node_name: _layer_class(by_name[node_name], microbatch) for node_name in order}
    sizes = {node_name: sum(by_name[node_name].activation_bytes) / microbatch for node_name in order}
    return ModelProfile(
        name=name,
        dtype=dtype,
        layers=tuple(LayerRun(name=node_name, layer_class=node_name) for node_name in order),
        classes=classes,
        edges=tuple(Edge(source=first, target=second, bytes_per_sample=sizes[first]) for first, second in graph.edges),
        pedigree=Pedigree(warnings=tuple(unit_warnings(graph))),
    )


def unit_warnings(graph: Graph) -> list[str]:
    """Return what looks like a wrong unit: times in seconds or microseconds, sizes in megabytes."""
    warnings = []
    total_ms = sum(node.forward_ms + node.backward_ms for node in graph.nodes)
    if total_ms > 1e3 * SLOWEST_PLAUSIBLE_S or 0 < total_ms < 1e-2:
        warnings.append(f"one minibatch takes {total_ms:g} ms in all: are the times in milliseconds?")
    largest = max(sum(node.activation_bytes) for node in graph.nodes)
    if 0 < largest < 1e3 and total_ms > 1:
        warnings.append(f"the largest activation has {largest:g} bytes: are the sizes in bytes?")
    return warnings


def _node(name: str, description: str, fields: str, where: str) -> GraphNode:
    values: dict[str, tuple[float, ...]] = {}
    for part in fields.split(", "):
        key, _, value = part.partition("=")
        values[key.strip()] = tuple(_number(item, where, key) for item in value.strip().strip("[]").split(";"))
    for key in _FIELDS:
        if key not in values:
            raise InvalidDocument(f"{where}: {key} is missing", field=key, hint="is the file cut off?")
    return GraphNode(
        name,
        description,
        _single(values, "forward_compute_time", where),
        _single(values, "backward_compute_time", where),
        values["activation_size"],
        _single(values, "parameter_size", where),
    )


def _single(values: dict[str, tuple[float, ...]], key: str, where: str) -> float:
    if len(values[key]) != 1:
        raise InvalidDocument(f"{where}: {key} has {len(values[key])} values, it takes 1", field=key)
    return values[key][0]


def _number(text: str, where: str, field: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise InvalidDocument(f"{where}: {field} is {text.strip()!r}, not a number", field=field) from error
    if not math.isfinite(value) or value < 0:
        raise InvalidDocument(f"{where}: {field} is {value}, it must be finite and at least 0", field=field)
    return value


def _layer_class(node: GraphNode, microbatch: int) -> LayerClass:
    has_weights = node.parameter_bytes > 0
    weight_share = 0.5 if has_weights else 0.0
    backward_s = node.backward_ms * 1e-3
    output_bytes = sum(node.activation_bytes)
    return LayerClass(
        kind="other",
        parameters=round(node.parameter_bytes / FLOAT_BYTES),
        costs=(
            ConfigurationCost(
                microbatch=microbatch,
                sequence_length=1,
                forward_s=node.forward_ms * 1e-3,
                input_grad_s=backward_s * (1 - weight_share),
                weight_grad_s=backward_s * weight_share,
                activation_bytes={Recompute.NONE: output_bytes},
                output_bytes=output_bytes,
                source=Source.MEASURED,
                sources={"input_grad_s": Source.ANALYTIC, "weight_grad_s": Source.ANALYTIC} if has_weights else {},
            ),
        ),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that compares runs of digits as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
