"""Mocked model profiles: a few numbers in, a valid ModelProfile out, without torch and without a device.

Numbers are given for one sample on one unsharded device. An entry for microbatch b and tensor degree t holds
b / t of the seconds and bytes (the boundary tensor is not split: every shard sends all of it), so sums stay simple
enough to check by hand. Every number is marked `mocked`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Literal

from stagewright.planner.documents import (
    Collective,
    ConfigurationCost,
    Edge,
    LayerClass,
    LayerRun,
    ModelProfile,
    Pedigree,
    Recompute,
    Source,
    TiedWeight,
)
from stagewright.planner.errors import InvalidArgument

Kind = Literal["embedding", "block", "norm", "head", "loss", "convolution", "pooling", "other"]
Numbers = float | Sequence[float]

_SELECTIVE_ACTIVATION_SHARE = 0.6
_SELECTIVE_RECOMPUTE_SHARE = 0.1


def profile_factory(
    num_layers: int | None = None,
    *,
    name: str = "mocked",
    forward_s: Numbers = 1e-3,
    input_grad_s: Numbers | None = None,
    weight_grad_s: Numbers | None = None,
    split_excess_s: Numbers = 0.0,
    parameters: int | Sequence[int] = 1_000_000,
    activation_bytes: Numbers = 4 * 2.0**20,
    output_bytes: Numbers = 2.0**20,
    workspace_bytes: Numbers = 0.0,
    optimizer_s: Numbers = 0.0,
    forward_flops: Numbers = 0.0,
    freed_at_input_grad: float = 0.0,
    kinds: Sequence[Kind] | None = None,
    microbatches: Iterable[int] = (1, 2, 4, 8),
    sequence_length: int = 128,
    tensor_degrees: Iterable[int] = (1,),
    dtype: Literal["fp64", "fp32", "bf16", "fp16", "fp8"] = "fp32",
    edges: Iterable[tuple[int, int]] | None = None,
    tied: Iterable[tuple[int, int]] = (),
    framework_bytes: float = 0.0,
    step_overhead_s: float = 0.0,
    action_overhead_s: float = 0.0,
    jitter: float = 0.0,
    seed: int = 0,
) -> ModelProfile:
    """Return a mocked profile of `num_layers` layers (8, or as many as the longest sequence given).

    A number stands for every layer; a sequence gives one value a layer. Gradients cost as much as the forward unless
    told. Recomputation: `none` keeps everything at no cost, `selective` keeps 60 % for 10 % of the forward, `full`
    keeps the input (the previous layer's `output_bytes`) for the whole forward.

    Parameters
    ----------
    edges : pairs of layer indices; a chain unless given.
    tied : pairs of layer indices that share all the parameters of the first.
    jitter : relative half-width of a seeded uniform factor on the seconds of each layer.

    Raises
    ------
    InvalidArgument : when sequences differ in length.
    """
    per_layer = {
        "forward_s": forward_s,
        "input_grad_s": forward_s if input_grad_s is None else input_grad_s,
        "weight_grad_s": forward_s if weight_grad_s is None else weight_grad_s,
        "split_excess_s": split_excess_s,
        "parameters": parameters,
        "activation_bytes": activation_bytes,
        "output_bytes": output_bytes,
        "workspace_bytes": workspace_bytes,
        "optimizer_s": optimizer_s,
        "forward_flops": forward_flops,
    }
    count = _num_layers(num_layers, {**per_layer, "kinds": kinds})
    rows = [{field: _value(value, index) for field, value in per_layer.items()} for index in range(count)]
    if jitter:
        _shake(rows, jitter, seed)
    layer_kinds: list[Kind] = list(kinds) if kinds else ["block"] * count
    shapes = [
        (layer_kinds[index], rows[max(index - 1, 0)]["output_bytes"], tuple(row.values()))
        for index, row in enumerate(rows)
    ]
    class_names = {shape: f"mocked-{index}" for index, shape in enumerate(dict.fromkeys(shapes))}
    configurations = [(b, sequence_length, t) for b in sorted(set(microbatches)) for t in sorted(set(tensor_degrees))]
    classes = {
        class_names[shape]: LayerClass(
            kind=layer_kinds[index],
            parameters=int(rows[index]["parameters"]),
            costs=tuple(
                _cost(rows[index], shape[1], configuration, freed_at_input_grad) for configuration in configurations
            ),
        )
        for index, shape in reversed(list(enumerate(shapes)))
    }
    names = [f"layer.{index}" for index in range(count)]
    return ModelProfile(
        name=name,
        dtype=dtype,
        layers=_runs([class_names[shape] for shape in shapes]),
        classes=classes,
        edges=None if edges is None else tuple(Edge(source=names[a], target=names[b]) for a, b in edges),
        tied=tuple(
            TiedWeight(
                parameter=f"{names[a]}.weight", layers=(names[a], names[b]), num_parameters=int(rows[a]["parameters"])
            )
            for a, b in tied
        ),
        framework_bytes=framework_bytes,
        framework_bytes_source=Source.MOCKED,
        step_overhead_s=step_overhead_s,
        action_overhead_s=action_overhead_s,
        pedigree=Pedigree(device="mocked"),
    )


def _num_layers(num_layers: int | None, values: dict[str, Numbers | Sequence[Kind] | None]) -> int:
    lengths = {field: len(value) for field, value in values.items() if isinstance(value, Sequence)}
    count = num_layers or max(lengths.values(), default=8)
    for field, length in lengths.items():
        if length != count:
            raise InvalidArgument(
                f"{field} has {length} values, the profile {count} layers",
                field=field,
                hint="give one value a layer, or one number for all",
            )
    return count


def _value(value: Numbers, index: int) -> float:
    return float(value[index] if isinstance(value, Sequence) else value)


def _shake(rows: list[dict[str, float]], jitter: float, seed: int) -> None:
    generator = random.Random(seed)
    for row in rows:
        for field in ("forward_s", "input_grad_s", "weight_grad_s"):
            row[field] *= 1.0 + jitter * (2.0 * generator.random() - 1.0)


def _cost(
    row: dict[str, float], input_bytes: float, configuration: tuple[int, int, int], freed_at_input_grad: float
) -> ConfigurationCost:
    microbatch, sequence_length, tensor_degree = configuration
    share = microbatch / tensor_degree
    kept = row["activation_bytes"] * share
    collectives: tuple[Collective, ...] = ()
    if tensor_degree > 1:
        payload = row["output_bytes"] * microbatch
        collectives = tuple(
            Collective(phase=phase, operation="all-reduce", group="tp", payload_bytes=payload, count=2)
            for phase in ("forward", "backward")
        )
    return ConfigurationCost(
        microbatch=microbatch,
        sequence_length=sequence_length,
        tensor_degree=tensor_degree,
        forward_s=row["forward_s"] * share,
        input_grad_s=row["input_grad_s"] * share,
        weight_grad_s=row["weight_grad_s"] * share,
        split_excess_s=row["split_excess_s"] * share,
        recompute_s={
            Recompute.SELECTIVE: _SELECTIVE_RECOMPUTE_SHARE * row["forward_s"] * share,
            Recompute.FULL: row["forward_s"] * share,
        },
        activation_bytes={
            Recompute.NONE: kept,
            Recompute.SELECTIVE: _SELECTIVE_ACTIVATION_SHARE * kept,
            Recompute.FULL: min(kept, input_bytes * microbatch),
        },
        freed_at_input_grad={Recompute.NONE: freed_at_input_grad} if freed_at_input_grad else {},
        workspace_bytes=row["workspace_bytes"] * share,
        output_bytes=row["output_bytes"] * microbatch,
        forward_flops=row["forward_flops"] * microbatch,
        optimizer_s=row["optimizer_s"] / tensor_degree,
        collectives=collectives,
        source=Source.MOCKED,
    )


def _runs(class_of_layer: list[str]) -> tuple[LayerRun, ...]:
    runs: list[LayerRun] = []
    start = 0
    for index in range(1, len(class_of_layer) + 1):
        if index == len(class_of_layer) or class_of_layer[index] != class_of_layer[start]:
            runs.append(LayerRun(name="layer.{}", layer_class=class_of_layer[start], count=index - start, start=start))
            start = index
    return tuple(runs)
