"""Piper's profile: nodes with one entry for each tensor degree and recomputation, and edges with a boundary size.

Times are seconds for one sample, sizes and communication bytes, bandwidth bytes per second. A node's memory is
`memoryUsageA * stashes + memoryUsageB`; `syncTimeFw[u]` and `syncTimeBw[v]` are the bytes that the tensor-parallel
layout adds on the edge from u or to v.
"""

from __future__ import annotations

from typing import Annotated, Literal

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

WEIGHT_BYTES = 4
_THIRD = 1.0 / 3.0

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PiperConfiguration(BaseModel):
    """One way to run a node at one tensor degree."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    id: Literal["vanilla", "activation recomp"]
    seconds_per_sample: Annotated[Amount, Field(alias="timePerSample")]
    parameter_bytes: Annotated[Amount, Field(alias="parameterSize")]
    bytes_per_stash: Annotated[Amount, Field(alias="memoryUsageA")]
    static_bytes: Annotated[Amount, Field(alias="memoryUsageB")]
    forward_sync_bytes: Annotated[dict[int, Amount], Field(alias="syncTimeFw")]
    backward_sync_bytes: Annotated[dict[int, Amount], Field(alias="syncTimeBw")]


class PiperNode(BaseModel):
    """A layer with its configurations by tensor degree."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    id: int
    name: str
    configurations: Annotated[dict[int, tuple[PiperConfiguration, ...]], Field(alias="TMPCs", min_length=1)]


class PiperEdge(BaseModel):
    """A tensor between two nodes."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    source: Annotated[int, Field(alias="sourceId")]
    target: Annotated[int, Field(alias="destId")]
    bytes_per_sample: Annotated[Amount, Field(alias="communicationCost")]


class PiperProblem(BaseModel):
    """A whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    num_devices: Annotated[int, Field(alias="maxDevices", ge=1)]
    memory_bytes: Annotated[float, Field(alias="maxMemoryPerDevice", gt=0)]
    bandwidth: Annotated[float, Field(gt=0)]
    num_microbatches: Annotated[int, Field(alias="mbsInBatch", ge=1)]
    nodes: Annotated[tuple[PiperNode, ...], Field(min_length=1)]
    edges: tuple[PiperEdge, ...]

    def to_json(self) -> dict[str, object]:
        """Return the file's object again."""
        return self.model_dump(mode="json", by_alias=True)


def read_piper_problem(path: str) -> PiperProblem:
    """Return the problem in a file; raises InvalidDocument with file and field."""
    try:
        problem = PiperProblem.model_validate(read_json(path))
    except ValidationError as error:
        raise invalid_document("Piper profile", error, source=path) from error
    ids = [node.id for node in problem.nodes]
    check_ids(ids, [(edge.source, edge.target) for edge in problem.edges], source=path)
    return problem


def unit_warnings(problem: PiperProblem) -> list[str]:
    """Return what looks like a wrong unit: sample times or bandwidth off by a factor of a thousand."""
    warnings = []
    total_s = sum(configuration.seconds_per_sample for node in problem.nodes for configuration in _vanilla(node, 1))
    if total_s > 60 or 0 < total_s < 1e-6:
        warnings.append(f"one sample takes {total_s:g} s in all: are the times in seconds?")
    if problem.bandwidth < 1e6:
        warnings.append(f"the bandwidth is {problem.bandwidth:g} bytes/s: is it in GB/s?")
    largest = max((edge.bytes_per_sample for edge in problem.edges), default=0.0)
    if 0 < largest < 64:
        warnings.append(f"the largest boundary has {largest:g} bytes: are the sizes in bytes?")
    return warnings


def profile_from_piper(problem: PiperProblem, *, name: str) -> ModelProfile:
    """Return the profile of one sample; the file has one time for forward and backward, split in thirds (analytic)."""
    output = {node.id: 0.0 for node in problem.nodes}
    for edge in problem.edges:
        output[edge.source] = max(output[edge.source], edge.bytes_per_sample)
    names = {node.id: f"{node.id}:{node.name}" for node in problem.nodes}
    return ModelProfile(
        name=name,
        layers=tuple(LayerRun(name=names[node.id], layer_class=names[node.id]) for node in problem.nodes),
        classes={names[node.id]: _layer_class(node, output[node.id]) for node in problem.nodes},
        edges=tuple(
            Edge(source=names[edge.source], target=names[edge.target], bytes_per_sample=edge.bytes_per_sample)
            for edge in problem.edges
        ),
        pedigree=Pedigree(warnings=tuple(unit_warnings(problem))),
    )


def cluster_from_piper(problem: PiperProblem, *, name: str) -> Cluster:
    """Return the file's devices with its one bandwidth."""
    link = LinkLevel(name="network", num_devices=problem.num_devices, latency_s=0.0, bytes_per_s=problem.bandwidth)
    device = Device(name="device", memory_bytes=problem.memory_bytes, memory_bytes_per_s=1e12, flops={"fp32": 1e13})
    group = NodeGroup(name="all", device=device, num_nodes=1, devices_per_node=problem.num_devices, links=(link,))
    return Cluster(name=name, groups=(group,))


def _vanilla(node: PiperNode, degree: int) -> list[PiperConfiguration]:
    return [entry for entry in node.configurations.get(degree, ()) if entry.id == "vanilla"]


def _layer_class(node: PiperNode, output_bytes: float) -> LayerClass:
    costs = []
    for degree, entries in sorted(node.configurations.items()):
        by_id = {entry.id: entry for entry in entries}
        plain = by_id.get("vanilla", entries[0])
        again = by_id.get("activation recomp", plain)
        third = plain.seconds_per_sample * _THIRD
        recompute_s = max(again.seconds_per_sample - plain.seconds_per_sample, 0.0)
        costs.append(
            ConfigurationCost(
                microbatch=1,
                sequence_length=1,
                tensor_degree=degree,
                forward_s=third,
                input_grad_s=third,
                weight_grad_s=third,
                recompute_s={Recompute.FULL: recompute_s},
                activation_bytes={Recompute.NONE: plain.bytes_per_stash, Recompute.FULL: again.bytes_per_stash},
                output_bytes=output_bytes,
                source=Source.ANALYTIC,
            )
        )
    parameters = max(entry.parameter_bytes for entry in node.configurations[min(node.configurations)])
    return LayerClass(kind="other", parameters=round(parameters / WEIGHT_BYTES), costs=tuple(costs))
