"""Galvatron's profile: JSON files of computation, memory, collectives and overlap, into a profile and a cluster.

`computation_profiling`: forward milliseconds for each layer and sample, by batch size and sequence (`layertype_0`, and
`layertype_other` for embedding and head). `memory_profiling`: MiB of a layer's parameters (4 bytes each) and of its
activations for each sample by tensor degree, and of embedding and head. Hardware files: GB/s by group size,
milliseconds by MiB, and the factor by which overlapped communication slows compute.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from stagewright.planner.documents import (
    Cluster,
    ConfigurationCost,
    Device,
    LayerClass,
    LayerRun,
    LinkLevel,
    LinkSegment,
    ModelProfile,
    NodeGroup,
    Pedigree,
    Recompute,
    Source,
)
from stagewright.planner.documents.document import invalid_document, read_json
from stagewright.planner.errors import InvalidDocument

MIB = 2.0**20
PARAMETER_BYTES = 4
BACKWARD_OVER_FORWARD = 2.0

_LAYER_TIME = re.compile(r"^layertype_(?P<kind>\w+?)_bsz(?P<batch>\d+)_seq(?P<sequence>\d+)$")
_NUMBERS = TypeAdapter(dict[str, float])
_MEMORY = TypeAdapter(dict[str, dict[str, float | dict[str, float | dict[str, float]]]])


@dataclass(frozen=True)
class GalvatronProfile:
    """The numbers of one model at one sequence length.

    Parameters
    ----------
    layer_ms, other_ms : forward milliseconds for each sample, by batch size; `other` is embedding and head together.
    parameter_mib : a layer's parameters.
    activation_mib : a layer's activations for each sample, by tensor degree.
    checkpoint_mib : the same under full recomputation.
    other_states_mib, other_activation_mib : embedding and head by tensor degree.
    """

    sequence_length: int
    layer_ms: Mapping[int, float]
    other_ms: Mapping[int, float]
    parameter_mib: float
    activation_mib: Mapping[int, float]
    checkpoint_mib: float
    other_states_mib: Mapping[int, float]
    other_activation_mib: Mapping[int, float]


def read_galvatron_profile(computation: Path | str, memory: Path | str) -> GalvatronProfile:
    """Return the profile in the two files; raises InvalidDocument with file and field."""
    times = _numbers(computation)
    by_kind: dict[str, dict[int, float]] = {}
    sequences: set[int] = set()
    for key, value in times.items():
        if match := _LAYER_TIME.match(key):
            by_kind.setdefault(match["kind"], {})[int(match["batch"])] = value
            sequences.add(int(match["sequence"]))
        if value <= 0:
            raise InvalidDocument(f"{computation}: {key} is {value}, a time is above 0", field=key)
    if "0" not in by_kind or "other" not in by_kind:
        raise InvalidDocument(f"{computation}: holds no layertype_0 and layertype_other times", field="layertype_0")
    if len(sequences) > 1:
        raise InvalidDocument(f"{computation}: mixes sequence lengths {sorted(sequences)}", field="seq")
    sequence = sequences.pop()
    try:
        table = _MEMORY.validate_python(read_json(memory))
    except ValidationError as error:
        raise invalid_document("Galvatron memory profile", error, source=str(memory)) from error
    layer = _section(table, "layertype_0", sequence, memory)
    other = _section(table, "other_memory_pp_off", sequence, memory)
    activation = layer.get("tp_activation_per_bsz_dict")
    parameter = layer.get("parameter_size")
    states, other_activation = other.get("model_states"), other.get("activation")
    if not isinstance(activation, dict) or not isinstance(states, dict) or not isinstance(other_activation, dict):
        raise InvalidDocument(f"{memory}: layertype_0 or other_memory_pp_off lacks its tables", field="layertype_0")
    if not isinstance(parameter, float | int):
        raise InvalidDocument(f"{memory}: layertype_0 lacks parameter_size", field="parameter_size")
    return GalvatronProfile(
        sequence,
        dict(sorted(by_kind["0"].items())),
        dict(sorted(by_kind["other"].items())),
        float(parameter),
        {int(key): float(value) for key, value in activation.items() if key.isdigit()},
        float(activation.get("checkpoint", 0.0)),
        {int(key): float(value) for key, value in states.items()},
        {int(key): float(value) for key, value in other_activation.items()},
    )


def computation_text(profile: GalvatronProfile) -> str:
    """Return the `computation_profiling` file of the profile."""
    sequence = profile.sequence_length
    times = {f"layertype_0_bsz{batch}_seq{sequence}": value for batch, value in profile.layer_ms.items()}
    times |= {f"layertype_other_bsz{batch}_seq{sequence}": value for batch, value in profile.other_ms.items()}
    return json.dumps(times, indent=4) + "\n"


def memory_text(profile: GalvatronProfile) -> str:
    """Return the `memory_profiling` file of the profile."""
    activation: dict[str, float] = {str(degree): value for degree, value in profile.activation_mib.items()}
    layer = {
        "parameter_size": profile.parameter_mib,
        "tp_activation_per_bsz_dict": activation | {"checkpoint": profile.checkpoint_mib},
    }
    other = {
        "model_states": {str(degree): value for degree, value in profile.other_states_mib.items()},
        "activation": {str(degree): value for degree, value in profile.other_activation_mib.items()},
    }
    sequence = str(profile.sequence_length)
    return json.dumps({"layertype_0": {sequence: layer}, "other_memory_pp_off": {sequence: other}}, indent=4) + "\n"


def profile_from_galvatron(profile: GalvatronProfile, *, name: str, num_layers: int, hidden_size: int) -> ModelProfile:
    """Return the profile: an embedding without time, `num_layers` blocks, and a head that holds all of `other`.

    A gradient takes as long as the forward, as Galvatron assumes (marked analytic); tensor degrees divide compute.
    """
    block_parameters = round(profile.parameter_mib * MIB / PARAMETER_BYTES)
    other_parameters = round(profile.other_states_mib[min(profile.other_states_mib)] * MIB / (4 * PARAMETER_BYTES))
    boundary = 2.0 * profile.sequence_length * hidden_size
    block = _layer_class(
        profile, profile.layer_ms, profile.activation_mib, block_parameters, boundary, kept=profile.checkpoint_mib
    )
    head = _layer_class(
        profile,
        profile.other_ms,
        profile.other_activation_mib,
        other_parameters - other_parameters // 2,
        0.0,
        kept=None,
    )
    free = dict.fromkeys(profile.other_ms, 0.0)
    nothing = dict.fromkeys(profile.other_activation_mib, 0.0)
    embedding = _layer_class(profile, free, nothing, other_parameters // 2, boundary, kept=None)
    return ModelProfile(
        name=name,
        dtype="bf16",
        layers=(
            LayerRun(name="embedding", layer_class="embedding"),
            LayerRun(name="layers.{}", layer_class="block", count=num_layers),
            LayerRun(name="head", layer_class="head"),
        ),
        classes={
            "embedding": embedding.model_copy(update={"kind": "embedding"}),
            "block": block.model_copy(update={"kind": "block"}),
            "head": head.model_copy(update={"kind": "head"}),
        },
        pedigree=Pedigree(warnings=tuple(unit_warnings(profile))),
    )


def unit_warnings(profile: GalvatronProfile) -> list[str]:
    """Return what looks like a wrong unit: a layer faster than 1 us or slower than 10 s, memory off by a thousand."""
    warnings = []
    slowest = max(profile.layer_ms.values())
    if slowest < 1e-3 or slowest > 1e4:
        warnings.append(f"a layer takes {slowest:g} ms for a sample: are the times in milliseconds?")
    if profile.parameter_mib < 1e-2 or profile.parameter_mib > 1e6:
        warnings.append(f"a layer has {profile.parameter_mib:g} MiB of parameters: are the sizes in MiB?")
    return warnings


def cluster_from_galvatron(
    *,
    name: str,
    devices_per_node: int,
    memory_bytes: float,
    allreduce: Path | str,
    point_to_point: Path | str,
    times: Path | str | None = None,
    overlap: Path | str | None = None,
) -> Cluster:
    """Return one node from the hardware files: bus bandwidth of the largest group, measured collective times."""
    bandwidth = _numbers(allreduce)
    links = _numbers(point_to_point)
    slowdown = max(1.0, next(iter(_numbers(overlap).values()))) if overlap is not None else 1.0
    link = LinkLevel(
        name="node",
        num_devices=devices_per_node,
        latency_s=5e-6,
        bytes_per_s=max(*links.values(), *bandwidth.values()) * 1e9,
        collectives={} if times is None else _collectives(_numbers(times)),
        overlap_slowdown=slowdown,
        source=Source.MEASURED,
    )
    device = Device(name="device", memory_bytes=memory_bytes, memory_bytes_per_s=2e12, flops={"bf16": 3.12e14})
    group = NodeGroup(name="node", device=device, num_nodes=1, devices_per_node=devices_per_node, links=(link,))
    return Cluster(name=name, groups=(group,))


def _collectives(times: Mapping[str, float]) -> dict[str, tuple[LinkSegment, ...]]:
    pattern = re.compile(r"^(allreduce|all2all)_size_(\d+)_(\d+)MB_time$")
    words = {"allreduce": "all-reduce", "all2all": "all-to-all"}
    tables: dict[str, list[LinkSegment]] = {}
    for key, milliseconds in times.items():
        if match := pattern.match(key):
            size = float(match[3]) * MIB
            segment = LinkSegment(from_bytes=size, latency_s=0.0, bytes_per_s=size / (milliseconds * 1e-3))
            tables.setdefault(f"{words[match[1]]}/{match[2]}", []).append(segment)
    return {key: tuple(sorted(rows, key=lambda row: row.from_bytes)) for key, rows in tables.items()}


def _layer_class(
    profile: GalvatronProfile,
    times_ms: Mapping[int, float],
    activation_mib: Mapping[int, float],
    parameters: int,
    output_bytes_per_sample: float,
    *,
    kept: float | None,
) -> LayerClass:
    costs = []
    for batch, milliseconds in times_ms.items():
        for tensor, size in sorted(activation_mib.items()):
            forward_s = milliseconds * 1e-3 * batch / tensor
            activation = {Recompute.NONE: size * MIB * batch}
            if kept is not None:
                activation[Recompute.FULL] = kept * MIB * batch / tensor
            costs.append(
                ConfigurationCost(
                    microbatch=batch,
                    sequence_length=profile.sequence_length,
                    tensor_degree=tensor,
                    forward_s=forward_s,
                    input_grad_s=forward_s * BACKWARD_OVER_FORWARD / 2,
                    weight_grad_s=forward_s * BACKWARD_OVER_FORWARD / 2,
                    recompute_s={Recompute.FULL: forward_s} if kept is not None else {},
                    activation_bytes=activation,
                    output_bytes=output_bytes_per_sample * batch,
                    source=Source.MEASURED if tensor == 1 else Source.ANALYTIC,
                    sources={"input_grad_s": Source.ANALYTIC, "weight_grad_s": Source.ANALYTIC},
                )
            )
    return LayerClass(kind="other", parameters=parameters, costs=tuple(costs))


def _section(
    table: Mapping[str, Mapping[str, float | dict[str, float | dict[str, float]]]],
    prefix: str,
    sequence: int,
    source: Path | str,
) -> dict[str, float | dict[str, float]]:
    for key in (f"{prefix}_sp", prefix):
        value = table.get(key, {}).get(str(sequence))
        if isinstance(value, dict):
            return value
    raise InvalidDocument(f"{source}: holds no {prefix} for sequence {sequence}", field=prefix)


def _numbers(path: Path | str) -> dict[str, float]:
    try:
        return _NUMBERS.validate_python(read_json(path))
    except ValidationError as error:
        raise invalid_document("Galvatron file", error, source=str(path)) from error
