"""From measured layers to the parts of a ModelProfile: runs of equal layers, class costs, edges and ties.

A class's number is the mean over its layers, so that the sum over the model is the measured one; a workspace and a
phase of a backward are the largest. A level of recomputation that keeps no less than a weaker one is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stagewright.modeling import Layer, LayerChain
from stagewright.planner.documents import (
    BackwardPhase,
    Collective,
    ConfigurationCost,
    Edge,
    LayerRun,
    Recompute,
    Source,
    TiedWeight,
)
from stagewright.planner.errors import InvalidDocument
from stagewright.profiler.measured_layers import LayerNumbers
from stagewright.profiler.model_bench import Configuration

_STRENGTH = {Recompute.NONE: 0, Recompute.SELECTIVE: 1, Recompute.FULL: 2}
_INDEX = re.compile(r"(?<![^._])(\d+)(?![^._])")


def check_ownership(chain: LayerChain) -> None:
    """Raise InvalidDocument unless every parameter belongs to exactly one layer, under each of its names."""
    owners: dict[str, list[str]] = {}
    for layer in chain.layers:
        for name in layer.parameters:
            owners.setdefault(name, []).append(layer.name)
    for name, _ in chain.model.named_parameters(remove_duplicate=False):
        holders = owners.get(name, [])
        if len(holders) != 1:
            raise InvalidDocument(
                f"parameter {name!r} belongs to {len(holders)} layers ({', '.join(holders) or 'none'}), it must be 1",
                field="model",
                hint="give the model stagewright_layers(), which returns its layers by name in order",
            )


def layer_runs(layers: Sequence[Layer]) -> tuple[LayerRun, ...]:
    """Return the layers with repeated ones declared once: equal class, names that differ in one index counted up."""
    runs: list[LayerRun] = []
    position = 0
    while position < len(layers):
        pattern, start, count = _longest_run(layers, position)
        name = pattern if count > 1 else layers[position].name
        layer_class = layers[position].layer_class
        runs.append(LayerRun(name=name, layer_class=layer_class, count=count, start=start if count > 1 else 0))
        position += count
    return tuple(runs)


def edges_of(chain: LayerChain) -> tuple[Edge, ...] | None:
    """Return the named edges of a graph, None for a chain."""
    if chain.named_edges is None:
        return None
    return tuple(Edge(source=source, target=target) for source, target in chain.named_edges)


def ties_of(chain: LayerChain) -> tuple[TiedWeight, ...]:
    """Return the parameters that several layers share."""
    return tuple(
        TiedWeight(parameter=tie.parameter, layers=tie.layers, num_parameters=tie.num_parameters) for tie in chain.ties
    )


def class_costs(
    configuration: Configuration,
    class_names: Sequence[str],
    numbers: Sequence[LayerNumbers],
    sources: Mapping[str, Source],
    collectives: Mapping[str, tuple[Collective, ...]],
) -> dict[str, ConfigurationCost]:
    """Return the cost entry of each class in one configuration.

    Parameters
    ----------
    class_names : of each measured layer.
    sources : fields that were not measured, and where they come from.
    collectives : what the shards of each class exchange.
    """
    members: dict[str, list[LayerNumbers]] = {}
    for name, value in zip(class_names, numbers, strict=True):
        members.setdefault(name, []).append(value)
    return {name: _cost(configuration, values, sources, collectives.get(name, ())) for name, values in members.items()}


def _longest_run(layers: Sequence[Layer], position: int) -> tuple[str, int, int]:
    """Return (name with {}, first index, count) of the longest run that begins at `position`."""
    first = layers[position]
    best = (first.name, 0, 1)
    for found in _INDEX.finditer(first.name):
        pattern = first.name[: found.start()] + "{}" + first.name[found.end() :]
        start = int(found.group())
        if str(start) != found.group() or "{}" in first.name:
            continue
        count = 1
        while position + count < len(layers):
            layer = layers[position + count]
            if layer.layer_class != first.layer_class or layer.name != pattern.replace("{}", str(start + count)):
                break
            count += 1
        if count > best[2]:
            best = (pattern, start, count)
    return best


def _cost(
    configuration: Configuration,
    values: Sequence[LayerNumbers],
    sources: Mapping[str, Source],
    collectives: tuple[Collective, ...],
) -> ConfigurationCost:
    def mean(name: str) -> float:
        return sum(float(getattr(value, name)) for value in values) / len(values)

    def mean_of(name: str, level: Recompute) -> float:
        return float(sum(getattr(value, name)[level] for value in values)) / len(values)

    activation = {level: mean_of("kept_bytes", level) for level in values[0].kept_bytes}
    activation = {
        level: kept for level, kept in activation.items() if level is Recompute.NONE or _saves(activation, level)
    }
    recompute = {
        level: mean_of("recompute_s", level)
        for level in activation
        if level is not Recompute.NONE and level in values[0].recompute_s
    }
    freed = mean("freed_at_input_grad")
    share = mean("input_grad_s") / max(mean("input_grad_s") + mean("weight_grad_s"), 1e-30)
    forward = _mean_spread([value.forward_spread_s for value in values])
    backward = _mean_spread([value.backward_spread_s for value in values])
    return ConfigurationCost(
        microbatch=configuration.microbatch,
        sequence_length=configuration.sequence_length,
        tensor_degree=configuration.tensor_degree,
        forward_s=mean("forward_s"),
        input_grad_s=mean("input_grad_s"),
        weight_grad_s=mean("weight_grad_s"),
        split_excess_s=mean("split_excess_s"),
        recompute_s=recompute,
        activation_bytes=activation,
        freed_at_input_grad={Recompute.NONE: freed} if freed else {},
        workspace_bytes=max(max(value.workspace_bytes for value in values), 0.0),
        forward_workspace_bytes={
            level: max(value.forward_workspace_bytes[level] for value in values) for level in activation
        },
        input_grad_workspace_bytes=max(value.input_grad_workspace_bytes for value in values),
        weight_grad_workspace_bytes=max(value.weight_grad_workspace_bytes for value in values),
        backward_phases=_phases([value.backward_phases for value in values]),
        output_bytes=mean("output_bytes"),
        unkept_input_bytes=min(value.unkept_input_bytes for value in values),
        forward_flops=mean("forward_flops") * configuration.tensor_degree,
        optimizer_s=mean("optimizer_s"),
        collectives=collectives,
        source=Source.MEASURED,
        sources=dict(sources),
        spread={
            "forward_s": forward,
            "input_grad_s": (backward[0] * share, backward[1] * share),
            "weight_grad_s": (backward[0] * (1.0 - share), backward[1] * (1.0 - share)),
        },
    )


def _phases(layers: Sequence[tuple[BackwardPhase, ...]]) -> tuple[BackwardPhase, ...]:
    """Return the phases of a class, each the largest of its layers; none where layers have other phases."""
    if len({tuple(phase.ends_with for phase in phases) for phases in layers}) > 1:
        return ()
    return tuple(
        BackwardPhase(
            ends_with=rows[0].ends_with,
            begin_bytes=max(phase.begin_bytes for phase in rows),
            peak_bytes=max(phase.peak_bytes for phase in rows),
        )
        for rows in zip(*layers, strict=True)
    )


def _saves(activation: Mapping[Recompute, float], level: Recompute) -> bool:
    """Whether a level keeps less than every weaker one, else it is not worth offering."""
    weaker = [kept for other, kept in activation.items() if _STRENGTH[other] < _STRENGTH[level]]
    return activation[level] < min(weaker)


def _mean_spread(spreads: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return (sum(low for low, _ in spreads) / len(spreads), sum(high for _, high in spreads) / len(spreads))
