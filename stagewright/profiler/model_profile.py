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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from stagewright.modeling import LayerChain
from stagewright.planner.documents import ConfigurationCost, LayerClass, ModelProfile, Pedigree, Source
from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.journal import EntryCache, Journal
from stagewright.profiler.measured_layers import ConfigurationNumbers
from stagewright.profiler.model_bench import Configuration, ModelBench, OptimizerName
from stagewright.profiler.model_source import ModelSource
from stagewright.profiler.profile_document import check_ownership, class_costs, edges_of, layer_runs, ties_of
from stagewright.profiler.ranks import ReportsProgress
from stagewright.profiler.session import Session, busy_siblings
from stagewright.profiler.settings import DTypeName, ProfileSettings, device_of, grid
from stagewright.profiler.structure import layer_structures
from stagewright.profiler.surroundings import DeviceState, device_name, device_state, disturbances, versions

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
    budget_s : about how long measuring may take; each measurement is made at least a few times all the same.
    cache : folder of journal and cache entries; nothing is kept without one.
    resume : go on from the journal of an interrupted profile with the same settings.
    refresh : ignore cached entries.

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
        budget_s=budget_s,
    )
    if source.module is not None and num_busy_ranks > 1:
        raise InvalidArgument(
            f"a module at hand cannot be built on {num_busy_ranks} ranks",
            field="num_busy_ranks",
            hint="name the model as module:factory, or profile with num_busy_ranks 1",
        )
    began = time.perf_counter()
    with _threads(settings):
        parts = _profile_parts(source, settings, cache, resume=resume, refresh=refresh, report=progress or _silent)
        return _document(source, settings, parts, name, time.perf_counter() - began)


@dataclass(frozen=True)
class _Overheads:
    """What a configuration costs beside its layers; cached like a layer."""

    action_s: float
    step_s: float


@dataclass(frozen=True)
class _Parts:
    """What a profile is assembled from."""

    chain: LayerChain
    costs: Mapping[Configuration, Mapping[str, ConfigurationCost]]
    overheads: tuple[_Overheads, ...]
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
    device = settings.torch_device
    report("model", 0, 1)
    chain = source.split(source.build(device=device, dtype=settings.torch_dtype))
    check_ownership(chain)
    keys = _keys(chain, settings)
    if settings.compiled:
        _compile(chain)
    report("model", 1, 1)
    folder = None if cache is None else Path(cache)
    entries = EntryCache(None if folder is None else folder / "layers")
    costs: dict[Configuration, dict[str, ConfigurationCost]] = {item: {} for item in settings.configurations}
    overheads: dict[Configuration, _Overheads] = {}
    if not refresh:
        _read_cache(entries, keys, costs, overheads)
    missing = [
        item for item in settings.configurations if len(costs[item]) < len(keys.classes) or item not in overheads
    ]
    warnings = [f"the cache entry {name} was damaged and is measured again" for name in entries.damaged]
    before = device_state(device)
    if missing:
        journal = Journal(None if folder is None else folder / "journals", keys.journal, resume=resume)
        if journal.num_damaged:
            warnings.append(f"{journal.num_damaged} lines of the journal were damaged and are measured again")
        bench = ModelBench(source, chain, device, settings.optimizer, own_time=not settings.oversubscribed)
        with busy_siblings(source, settings, missing, report):
            numbers = Session(settings, bench, journal, report).measure(missing)
        for configuration, value in numbers.items():
            measured = class_costs(configuration, chain.layers, value.layers, _sources(settings))
            costs[configuration] = {**measured, **costs[configuration]}
            overheads.setdefault(configuration, _overheads(value))
        _write_cache(entries, keys, {item: costs[item] for item in missing}, overheads)
        journal.close()
        warnings += _judgement(numbers, chain, (before, device_state(device)))
    for warning in warnings:
        _log.warning("%s", warning)
    ordered = tuple(overheads[item] for item in settings.configurations)
    return _Parts(chain, costs, ordered, (before, device_state(device)), tuple(warnings))


@dataclass(frozen=True)
class _Keys:
    """Cache keys: of each class, of the model's overheads, of the journal."""

    classes: Mapping[str, Mapping[str, object]]
    model: Mapping[str, object]
    journal: Mapping[str, object]


def _keys(chain: LayerChain, settings: ProfileSettings) -> _Keys:
    device = settings.torch_device
    common: dict[str, object] = {
        "device": device_name(device),
        "versions": versions(device),
        "dtype": settings.dtype,
        "load": [settings.num_busy_ranks, settings.num_threads],
        "optimizer": settings.optimizer,
        "compiled": settings.compiled,
    }
    structures = layer_structures(chain)
    layers = [[layer.name, structures[layer.layer_class]] for layer in chain.layers]
    shapes = [_shape(item) for item in settings.configurations]
    return _Keys(
        classes={name: {**common, "layer": structure} for name, structure in structures.items()},
        model={**common, "layers": layers},
        journal={**common, "layers": layers, "shapes": shapes},
    )


def _shape(configuration: Configuration) -> list[int]:
    return [configuration.microbatch, configuration.sequence_length, configuration.tensor_degree]


def _read_cache(
    entries: EntryCache,
    keys: _Keys,
    costs: dict[Configuration, dict[str, ConfigurationCost]],
    overheads: dict[Configuration, _Overheads],
) -> None:
    for configuration, found in costs.items():
        shape = {"shape": _shape(configuration)}
        for name, key in keys.classes.items():
            entry = entries.get({**key, **shape})
            if entry is not None:
                found[name] = ConfigurationCost.model_validate(entry)
        entry = entries.get({**keys.model, **shape})
        if entry is not None:
            overheads[configuration] = _Overheads(float(str(entry["action_s"])), float(str(entry["step_s"])))


def _write_cache(
    entries: EntryCache,
    keys: _Keys,
    costs: Mapping[Configuration, Mapping[str, ConfigurationCost]],
    overheads: Mapping[Configuration, _Overheads],
) -> None:
    for configuration, values in costs.items():
        shape = {"shape": _shape(configuration)}
        for name, cost in values.items():
            entries.put({**keys.classes[name], **shape}, cost.model_dump(mode="json"))
        value = overheads[configuration]
        entries.put({**keys.model, **shape}, {"action_s": value.action_s, "step_s": value.step_s})


def _overheads(numbers: ConfigurationNumbers) -> _Overheads:
    """A microbatch is two actions; what one takes beside its layers, and what a step takes beside its microbatches."""
    return _Overheads((numbers.outside_s + numbers.entrance_s) / 2, numbers.first_extra_s + numbers.clearing_s)


def _sources(settings: ProfileSettings) -> dict[str, Source]:
    """A compiled backward is not split: half of it is booked to each gradient."""
    return dict.fromkeys(("input_grad_s", "weight_grad_s"), Source.ANALYTIC) if settings.compiled else {}


def _judgement(
    numbers: Mapping[Configuration, ConfigurationNumbers], chain: LayerChain, states: tuple[DeviceState, DeviceState]
) -> list[str]:
    """Return what a planner should know before it trusts the numbers."""
    shares = [share for value in numbers.values() for share in value.busy_shares]
    drift = statistics.median(value.drift for value in numbers.values())
    warnings = list(disturbances(*states, shares, drift))
    for configuration, value in numbers.items():
        whole = sum(layer.forward_s + layer.input_grad_s + layer.weight_grad_s for layer in value.layers)
        wide = {
            layer.layer_class
            for layer, row in zip(chain.layers, value.layers, strict=True)
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
    classes = {
        class_name: LayerClass(
            kind=layer.kind,
            parameters=layer.num_parameters,
            costs=tuple(parts.costs[item][class_name] for item in settings.configurations),
        )
        for class_name, layer in first.items()
    }
    pedigree = Pedigree(
        device=device_name(device),
        num_busy_ranks=settings.num_busy_ranks,
        threads_per_rank=settings.num_threads,
        versions={**versions(device), "optimizer": settings.optimizer},
        driver=parts.states[1].driver,
        clock_hz=parts.states[1].clock_hz,
        cache_policy="none",
        compiled=settings.compiled,
        taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        duration_s=duration_s,
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
        step_overhead_s=statistics.median(item.step_s for item in parts.overheads),
        action_overhead_s=statistics.median(item.action_s for item in parts.overheads),
        pedigree=pedigree,
    )


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
