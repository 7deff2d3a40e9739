"""The profile of a model: every layer class measured on this device, inside the running model, under a run's load.

The model is cut at its layers and run microbatch by microbatch as an interpreter would run it (`model_bench`); on CPU,
sibling processes run the same model meanwhile, as many as the run will have. What was measured is kept: finished
measurements in a journal (resuming repeats at most the one that was under way), finished classes in a cache by device,
versions, structure and shape.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from stagewright.modeling import LayerChain
from stagewright.modeling.kept_memory import keep_freed_memory
from stagewright.planner.documents import ConfigurationCost, LayerClass, ModelProfile, Pedigree, Source
from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.cut_check import refused_layers
from stagewright.profiler.journal import Journal
from stagewright.profiler.measured_layers import ConfigurationNumbers
from stagewright.profiler.model_bench import CachePolicy, Configuration, ModelBench, OptimizerName
from stagewright.profiler.model_shapes import (
    MeasuredChain,
    ModelShapes,
    expert_parameters,
    replicated_parameters,
    weight_tensors,
)
from stagewright.profiler.model_source import ModelSource
from stagewright.profiler.profile_cache import Costs, Overheads, ProfileCache
from stagewright.profiler.profile_document import check_ownership, class_costs, edges_of, layer_runs, ties_of
from stagewright.profiler.ranks import ReportsProgress
from stagewright.profiler.session import Session, busy_siblings
from stagewright.profiler.settings import DTypeName, ProfileSettings, device_of, grid
from stagewright.profiler.surroundings import DeviceState, device_name, device_state, disturbances, versions
from stagewright.profiler.tensor_shard import summed_parameters, vocabulary_parameters

WIDE_SPREAD = 0.25
_SIGNIFICANT = 0.02
_MAX_SPLIT_OVERHEAD = 0.1

_log = logging.getLogger(__name__)


def profile_model(
    model: str | nn.Module,
    *,
    microbatches: Sequence[int] = (1, 2, 4),
    sequence_length: int | Sequence[int] = 128,
    tensor_degrees: Sequence[int] = (1,),
    num_busy_ranks: int = 1,
    num_threads: int = 1,
    device: str = "auto",
    dtype: DTypeName = "fp32",
    optimizer: OptimizerName = "adamw",
    data: str | None = None,
    layers: str | None = None,
    compiled: bool = False,
    cache_policy: CachePolicy = "hot",
    budget_s: float = 30.0,
    cache: Path | str | None = None,
    resume: bool = False,
    refresh: bool = False,
    name: str | None = None,
    progress: ReportsProgress | None = None,
) -> ModelProfile:
    """Return the measured profile of a model.

    Parameters
    ----------
    model : `module:factory`, `path.py:factory`, the path of a Hugging Face config.json, or a module at hand.
    microbatches, sequence_length, tensor_degrees : the grid that is measured.
    num_busy_ranks : on CPU, how many ranks the run will keep busy on this machine, this one included.
    num_threads : threads of each rank on CPU.
    device : auto (CUDA when there is one), cpu, cuda or cuda:INDEX.
    optimizer : whose step is timed.
    data : reference of a data factory; else the `data` beside the model's factory, or random inputs.
    layers : pattern of the modules that are layers, such as `model.layers.*`, where they are not found well.
    compiled : compile each layer with torch.compile first.
    cache_policy : hot leaves the caches as the layer before left them, as in a run; flushed empties them before each.
    budget_s : about how long measuring may take; each measurement is made at least a few times all the same.
    cache : folder of journal and cache entries; nothing is kept without one.
    resume : go on from the journal of an interrupted profile with the same settings.
    refresh : ignore cached entries.

    On CPU this process keeps its freed memory from then on, as the ranks of a run do.

    Raises
    ------
    InvalidArgument : when the model, its batches or a setting make no sense.
    """
    source = (
        ModelSource(model, None, data, layers) if isinstance(model, str) else ModelSource(None, model, data, layers)
    )
    lengths = (sequence_length,) if isinstance(sequence_length, int) else tuple(sequence_length)
    settings = ProfileSettings(
        configurations=grid(microbatches, lengths, tensor_degrees),
        num_busy_ranks=num_busy_ranks,
        num_threads=num_threads,
        device=str(device_of(device)),
        dtype=dtype,
        optimizer=optimizer,
        compiled=compiled,
        cache_policy=cache_policy,
        budget_s=budget_s,
    )
    if source.module is not None and num_busy_ranks > 1:
        raise InvalidArgument(
            f"a module at hand cannot be built on {num_busy_ranks} ranks",
            field="num_busy_ranks",
            hint="name the model as module:factory, or profile with num_busy_ranks 1",
        )
    began = time.perf_counter()
    if settings.torch_device.type == "cpu":
        keep_freed_memory()
    with _threads(settings):
        parts = _profile_parts(source, settings, cache, resume=resume, refresh=refresh, report=progress or _silent)
        return _document(source, settings, parts, name, time.perf_counter() - began)


@dataclass(frozen=True)
class _Parts:
    """What a profile is assembled from."""

    chain: LayerChain
    costs: Costs
    states: tuple[DeviceState, DeviceState]
    warnings: tuple[str, ...]


def _profile_parts(
    source: ModelSource,
    settings: ProfileSettings,
    cache: Path | str | None,
    *,
    resume: bool,
    refresh: bool,
    report: ReportsProgress,
) -> _Parts:
    report("model", 0, 1)
    shapes = ModelShapes(source, settings)
    check_ownership(shapes.whole)
    report("model", 1, 1)
    store = ProfileCache(None if cache is None else Path(cache), settings, shapes.whole, shapes.structures)
    costs = Costs() if refresh else store.read(settings.configurations)
    missing = costs.missing(settings.configurations, len(shapes.structures))
    warnings = [f"the cache entry {name} was damaged and is measured again" for name in store.damaged]
    if shapes.num_layers is not None:
        warnings.append(f"the model does not fit the device; it was measured shortened to {shapes.num_layers} layers")
    before = device_state(settings.torch_device)
    if missing:
        journal = store.journal(resume=resume)
        if journal.num_damaged:
            warnings.append(f"{journal.num_damaged} lines of the journal were damaged and are measured again")
        for degree in sorted({item.tensor_degree for item in missing}):
            group = [item for item in missing if item.tensor_degree == degree]
            share = settings.budget_s * len(group) / len(missing)
            measured = shapes.measured(degree)
            told = replace(settings, budget_s=share)
            numbers, probe_s = _measure(source, told, shapes, measured, group, journal, report, costs.probe_s or None)
            costs.probe_s = probe_s or 0.0
            _add(costs, settings, measured, numbers)
            warnings += [
                f"{item.text} does not fit the device and was not measured" for item in group if item not in numbers
            ]
            if numbers and degree == min(item.tensor_degree for item in missing):
                warnings += _uncuttable(source, settings, measured, min(numbers))
            warnings += _judgement(numbers, measured, (before, device_state(settings.torch_device)))
        costs.drop_incomplete(len(shapes.structures))
        store.write(costs, [item for item in missing if item in costs.overheads])
        journal.close()
    if not costs.overheads:
        raise InvalidArgument(
            "no configuration fits the device", field="microbatches", hint="measure smaller microbatches or sequences"
        )
    for warning in warnings:
        _log.warning("%s", warning)
    states = (before, device_state(settings.torch_device))
    return _Parts(shapes.whole, costs, states, tuple(dict.fromkeys(warnings)))


def _measure(
    source: ModelSource,
    settings: ProfileSettings,
    shapes: ModelShapes,
    measured: MeasuredChain,
    configurations: Sequence[Configuration],
    journal: Journal,
    report: ReportsProgress,
    probe_s: float | None,
) -> tuple[dict[Configuration, ConfigurationNumbers], float | None]:
    """Return the numbers and what a probe takes at their speed, `probe_s` where that is given."""
    if settings.compiled:
        _compile(measured.chain)
    own_time = not settings.oversubscribed
    bench = ModelBench(
        source,
        measured.chain,
        settings.torch_device,
        settings.optimizer,
        own_time=own_time,
        cache_policy=settings.cache_policy,
    )
    with busy_siblings(source, settings, configurations, report, num_layers=shapes.num_layers):
        session = Session(settings, bench, journal, report, probe_s=probe_s)
        numbers = session.measure(configurations)
        return numbers, session.probe_s


def _uncuttable(
    source: ModelSource, settings: ProfileSettings, measured: MeasuredChain, item: Configuration
) -> list[str]:
    """Return a warning when stages cannot begin everywhere."""
    chain = measured.chain
    batch = source.batch(chain.model, item.microbatch, item.sequence_length, settings.torch_device)
    refused = refused_layers(chain, batch)
    if not refused:
        return []
    names = ", ".join(refused)
    return [
        f"no stage can begin at {names} ({next(iter(refused.values()))}): pin pp=1, or list the layers and what skips "
        "them with stagewright_layers() and stagewright_edges()"
    ]


def _add(
    costs: Costs,
    settings: ProfileSettings,
    measured: MeasuredChain,
    numbers: Mapping[Configuration, ConfigurationNumbers],
) -> None:
    """Put what was measured with what the cache held; cached classes stay as they were."""
    sizes = dict(zip(measured.class_names, (layer.num_parameters for layer in measured.chain.layers), strict=True))
    for item, value in numbers.items():
        collectives = measured.collectives(item, value.layers) if item.tensor_degree > 1 else {}
        found = class_costs(item, measured.class_names, value.layers, _sources(settings), collectives)
        costs.classes[item] = {**found, **costs.classes.get(item, {})}
        unused: dict[str, int] = {}
        for name, each in zip(measured.class_names, value.layers, strict=True):
            unused[name] = min(each.unused_parameters, unused.get(name, each.unused_parameters))
        costs.overheads.setdefault(item, _overheads(value, sizes, unused))


def _overheads(numbers: ConfigurationNumbers, sizes: Mapping[str, int], unused: Mapping[str, int]) -> Overheads:
    """A microbatch is two actions; what one takes beside its layers, and what a step takes beside its microbatches."""
    action_s = (numbers.outside_s + numbers.entrance_s) / 2
    return Overheads(
        action_s, numbers.entrance_s, numbers.empty_step_s, sizes, unused, numbers.jitter, numbers.copy_bytes_per_s
    )


def _sources(settings: ProfileSettings) -> dict[str, Source]:
    """A compiled backward is not split: half of it is booked to each gradient."""
    return dict.fromkeys(("input_grad_s", "weight_grad_s"), Source.ANALYTIC) if settings.compiled else {}


def _judgement(
    numbers: Mapping[Configuration, ConfigurationNumbers],
    measured: MeasuredChain,
    states: tuple[DeviceState, DeviceState],
) -> list[str]:
    """Return what a planner should know before it trusts the numbers."""
    shares = [share for value in numbers.values() for share in value.busy_shares]
    drift = statistics.median([value.drift for value in numbers.values()] or [0.0])
    warnings = list(disturbances(*states, shares, drift))
    for configuration, value in numbers.items():
        whole = sum(layer.forward_s + layer.input_grad_s + layer.weight_grad_s for layer in value.layers)
        wide = {
            name
            for name, row in zip(measured.class_names, value.layers, strict=True)
            if row.forward_s > _SIGNIFICANT * whole
            and row.forward_spread_s[1] - row.forward_spread_s[0] > WIDE_SPREAD * row.forward_s
        }
        if wide:
            warnings.append(
                f"{configuration.text}: the spread of {', '.join(sorted(wide))} is wider than {WIDE_SPREAD:.0%}, "
                "too wide to plan on"
            )
        if value.split_overhead is not None and abs(value.split_overhead) > _MAX_SPLIT_OVERHEAD:
            warnings.append(
                f"{configuration.text}: input and weight gradient apart take {1 + value.split_overhead:.2f} times the "
                "fused backward"
            )
    return warnings


def _document(
    source: ModelSource, settings: ProfileSettings, parts: _Parts, name: str | None, duration_s: float
) -> ModelProfile:
    chain, device = parts.chain, settings.torch_device
    first = {layer.layer_class: layer for layer in reversed(chain.layers)}
    costs, tensors = parts.costs, weight_tensors(chain)
    experts = {class_name: expert_parameters(chain, layer) for class_name, layer in first.items()}
    configurations = [item for item in settings.configurations if item in costs.overheads]
    classes = {
        class_name: LayerClass(
            kind=layer.kind,
            parameters=layer.num_parameters,
            replicated_parameters=_replicated(
                costs, configurations, class_name, layer.num_parameters, experts[class_name]
            ),
            expert_parameters=experts[class_name],
            summed_parameters=summed_parameters(chain, layer),
            vocabulary_parameters=vocabulary_parameters(chain, layer),
            unused_parameters=_unused(costs, configurations, class_name, layer.num_parameters),
            tensors=tensors[layer.name],
            costs=_with_whole_flops([costs.classes[item][class_name] for item in configurations]),
        )
        for class_name, layer in first.items()
    }
    overheads = [costs.overheads[item] for item in configurations]
    rates = [item.copy_bytes_per_s for item in overheads if item.copy_bytes_per_s is not None]
    pedigree = Pedigree(
        device=device_name(device),
        num_busy_ranks=settings.num_busy_ranks,
        threads_per_rank=settings.num_threads,
        versions={**versions(device), "optimizer": settings.optimizer},
        driver=parts.states[1].driver,
        clock_hz=parts.states[1].clock_hz,
        cache_policy=settings.cache_policy,
        compiled=settings.compiled,
        taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        duration_s=duration_s,
        probe_s=costs.probe_s,
        warnings=parts.warnings,
    )
    return ModelProfile(
        name=name or source.name,
        dtype=settings.dtype,
        layers=layer_runs(chain.layers),
        classes=classes,
        edges=edges_of(chain),
        tied=ties_of(chain),
        framework_bytes=_framework_bytes(device),
        framework_bytes_source=Source.MEASURED,
        step_overhead_s=statistics.median(item.step_s for item in overheads),
        action_overhead_s=statistics.median(item.action_s for item in overheads),
        entrance_s=statistics.median(item.entrance_s for item in overheads),
        copy_bytes_per_s=statistics.median(rates) if rates else None,
        jitter=min((item.jitter for item in overheads if item.jitter), key=lambda each: each.piece_s, default=None),
        pedigree=pedigree,
    )


def _with_whole_flops(costs: Sequence[ConfigurationCost]) -> tuple[ConfigurationCost, ...]:
    """Return the entries with the FLOP of the whole layer where it was measured, not of shards times their degree."""
    whole = {cost.key[:2]: cost.forward_flops for cost in costs if cost.tensor_degree == 1}
    return tuple(
        cost.model_copy(update={"forward_flops": whole.get(cost.key[:2], cost.forward_flops)}) for cost in costs
    )


def _replicated(costs: Costs, configurations: Sequence[Configuration], name: str, whole: int, experts: int) -> int:
    """Return what tensor parallelism does not split beside experts, seen in the smallest shard; 0 when none was measured."""
    sharded = [item for item in configurations if item.tensor_degree > 1]
    if not sharded:
        return 0
    item = max(sharded, key=lambda item: item.tensor_degree)
    shard = costs.overheads[item].parameters.get(name, whole)
    return replicated_parameters(whole - experts, max(shard - experts, 0), item.tensor_degree)


def _unused(costs: Costs, configurations: Sequence[Configuration], name: str, whole: int) -> int:
    """Return how many of a layer's parameters no forward uses, seen in the largest shard."""
    overheads = costs.overheads[min(configurations, key=lambda item: item.tensor_degree)]
    shard = overheads.parameters.get(name, whole)
    return round(overheads.unused.get(name, 0) * whole / shard) if shard else 0


def _framework_bytes(device: torch.device) -> float:
    """Return the device memory in use that no tensor holds: context, libraries, the allocator's own.

    On CPU the interpreter lives in the host's memory, which is not the rank's share of it: 0.
    """
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free - torch.cuda.memory_reserved(device))


def _compile(chain: LayerChain) -> None:
    for layer in chain.layers:
        for path in layer.modules:
            module = chain.model.get_submodule(path)
            module.forward = torch.compile(module.forward)


@contextmanager
def _threads(settings: ProfileSettings) -> Iterator[None]:
    before = torch.get_num_threads()
    if settings.torch_device.type == "cpu":
        torch.set_num_threads(settings.num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _silent(phase: str, done: int, total: int) -> None:
    """Report nothing."""
