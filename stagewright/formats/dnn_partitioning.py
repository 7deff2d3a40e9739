"""The profile of Tarnawski et al. 2020 (dnn-partitioning): nodes with accelerator and CPU latency, edges with cost.

Latencies and edge costs are milliseconds, sizes bytes. Nodes of one colour class must share a device; forward and
backward nodes of a layer do.
"""

from __future__ import annotations

from statistics import median
from typing import Annotated, Literal

import networkx as nx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stagewright.formats.graph_check import check_ids
from stagewright.planner.documents import (
    Cluster,
    ConfigurationCost,
    Device,
    Edge,
    LayerClass,
    LayerRun,
    LinkLevel,
    ModelProfile,
    NodeGroup,
    Pedigree,
    Recompute,
    Source,
)
from stagewright.planner.documents.document import invalid_document, read_json
from stagewright.planner.errors import InvalidDocument

SLOWEST_LINK_BYTES_PER_S, FASTEST_LINK_BYTES_PER_S = 1e7, 1e12
_FREE_SIZE_BYTES = 4096  # smaller messages are all latency, their rate says nothing

Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PartitionNode(BaseModel):
    """One operator or layer."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: str
    id: int
    supported_on_accelerator: Annotated[bool, Field(alias="supportedOnFpga")]
    cpu_ms: Annotated[Milliseconds, Field(alias="cpuLatency")]
    accelerator_ms: Annotated[Milliseconds, Field(alias="fpgaLatency")]
    is_backward: Annotated[bool, Field(alias="isBackwardNode")]
    colour: Annotated[int | None, Field(alias="colorClass")] = None
    size_bytes: Annotated[Size, Field(alias="size")]


class PartitionEdge(BaseModel):
    """A tensor between two nodes: milliseconds to send it, and its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    source: Annotated[int, Field(alias="sourceId")]
    target: Annotated[int, Field(alias="destId")]
    cost_ms: Annotated[Milliseconds, Field(alias="cost")]
    size_bytes: Annotated[Size | None, Field(alias="size")] = None


class PartitionProblem(BaseModel):
    """A whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    accelerator_memory_bytes: Annotated[Size, Field(alias="maxSizePerFPGA")]
    num_accelerators: Annotated[int, Field(alias="maxFPGAs", ge=0)]
    num_cpus: Annotated[int, Field(alias="maxCPUs", ge=0)]
    nodes: tuple[PartitionNode, ...]
    edges: tuple[PartitionEdge, ...]

    def groups(self) -> tuple[tuple[PartitionNode, ...], ...]:
        """Return the nodes that must stay together, by colour class, in order of their first node."""
        members: dict[int | str, list[PartitionNode]] = {}
        for node in self.nodes:
            members.setdefault(node.colour if node.colour is not None else f"node {node.id}", []).append(node)
        return tuple(tuple(group) for group in members.values())

    def to_json(self) -> dict[str, object]:
        """Return the file's object again."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def read_partition_problem(path: str) -> PartitionProblem:
    """Return the problem in a file; raises InvalidDocument with file and field."""
    value = read_json(path)
    try:
        problem = PartitionProblem.model_validate(value)
    except ValidationError as error:
        raise invalid_document("dnn-partitioning profile", error, source=path) from error
    ids = [node.id for node in problem.nodes]
    check_ids(ids, [(edge.source, edge.target) for edge in problem.edges], source=path)
    return problem


def unit_warnings(problem: PartitionProblem) -> list[str]:
    """Return what looks like a wrong unit: the rate that edge costs and sizes imply is no link's."""
    rate = implied_bytes_per_s(problem)
    if rate is None or SLOWEST_LINK_BYTES_PER_S <= rate <= FASTEST_LINK_BYTES_PER_S:
        return []
    factor = rate / 1e9
    return [
        f"edge costs and sizes imply {rate:.3g} bytes/s, no link has that: communication looks about {factor:.0f} times "
        "too small against a 1 GB/s link; are the costs in seconds rather than milliseconds?"
    ]


def implied_bytes_per_s(problem: PartitionProblem) -> float | None:
    """Return the median of size over cost among edges large enough to tell; None when there are none.

    The size that belongs to a cost is the smaller of the edges' sizes where one node's output has several.
    """
    smallest: dict[tuple[int, float], float] = {}
    for edge in problem.edges:
        if edge.size_bytes and edge.cost_ms and edge.size_bytes >= _FREE_SIZE_BYTES:
            key = (edge.source, edge.cost_ms)
            smallest[key] = min(smallest.get(key, edge.size_bytes), edge.size_bytes)
    rates = [size / (cost_ms * 1e-3) for (_, cost_ms), size in smallest.items()]
    return median(rates) if rates else None


def profile_from_problem(problem: PartitionProblem, *, name: str) -> ModelProfile:
    """Return the profile of one sample: a layer for each colour class, its backward nodes merged in.

    A class's backward time is halved between the two gradients when it holds memory, and marked analytic.
    """
    groups = problem.groups()
    position = {node.id: index for index, group in enumerate(groups) for node in group}
    forward_edges = {
        (position[edge.source], position[edge.target]): edge.size_bytes or 0.0
        for edge in problem.edges
        if position[edge.source] != position[edge.target] and not _touches_backward(problem, edge)
    }
    order = _topological(len(groups), list(forward_edges))
    names = [groups[index][0].name for index in order]
    place = {index: rank for rank, index in enumerate(order)}
    output_bytes = {
        index: max((size for (first, _), size in forward_edges.items() if first == index), default=0.0)
        for index in order
    }
    return ModelProfile(
        name=name,
        layers=tuple(LayerRun(name=names[rank], layer_class=names[rank]) for rank in range(len(order))),
        classes={names[place[index]]: _layer_class(groups[index], output_bytes[index]) for index in order},
        edges=tuple(
            Edge(source=names[place[first]], target=names[place[second]], bytes_per_sample=size)
            for (first, second), size in forward_edges.items()
        ),
        pedigree=Pedigree(warnings=tuple(unit_warnings(problem))),
    )


def cluster_from_problem(problem: PartitionProblem, *, name: str, bytes_per_s: float) -> Cluster:
    """Return the file's accelerators and CPUs as a cluster; the file has no bandwidth, so it must be told."""
    kinds: list[tuple[Literal["cuda", "cpu"], int, float]] = [
        ("cuda", problem.num_accelerators, problem.accelerator_memory_bytes),
        ("cpu", problem.num_cpus, 1e15),
    ]
    groups = []
    for kind, count, memory in kinds:
        if count:
            link = LinkLevel(name="node", num_devices=count, latency_s=0.0, bytes_per_s=bytes_per_s)
            device = Device(name=kind, kind=kind, memory_bytes=memory, memory_bytes_per_s=1e12, flops={"fp32": 1e13})
            groups.append(NodeGroup(name=kind, device=device, num_nodes=1, devices_per_node=count, links=(link,)))
    total = sum(group.num_devices for group in groups)
    between = (
        LinkLevel(name="host", num_devices=total, latency_s=0.0, bytes_per_s=bytes_per_s) if len(groups) > 1 else None
    )
    return Cluster(name=name, groups=tuple(groups), between_groups=between)


def _touches_backward(problem: PartitionProblem, edge: PartitionEdge) -> bool:
    backward = {node.id for node in problem.nodes if node.is_backward}
    return edge.source in backward or edge.target in backward


def _topological(count: int, edges: list[tuple[int, int]]) -> list[int]:
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(range(count))
    try:
        return list(nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible as error:
        raise InvalidDocument("the edges between colour classes form a cycle", field="edges") from error


def _layer_class(group: tuple[PartitionNode, ...], output_bytes: float) -> LayerClass:
    forward_s = sum(node.accelerator_ms for node in group if not node.is_backward) * 1e-3
    backward_s = sum(node.accelerator_ms for node in group if node.is_backward) * 1e-3
    size = sum(node.size_bytes for node in group)
    weight_share = 0.5 if size else 0.0
    return LayerClass(
        kind="other",
        parameters=0,
        costs=(
            ConfigurationCost(
                microbatch=1,
                sequence_length=1,
                forward_s=forward_s,
                input_grad_s=backward_s * (1 - weight_share),
                weight_grad_s=backward_s * weight_share,
                activation_bytes={Recompute.NONE: size},
                output_bytes=output_bytes,
                source=Source.MEASURED,
                sources={"input_grad_s": Source.ANALYTIC, "weight_grad_s": Source.ANALYTIC} if weight_share else {},
            ),
        ),
    )
