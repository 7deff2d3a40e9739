"""Class costs and overheads in the cache: which keys they have, what is missing, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stagewright.modeling import LayerChain
from stagewright.planner.documents import ConfigurationCost, Jitter
from stagewright.profiler.journal import EntryCache, Journal
from stagewright.profiler.model_bench import Configuration
from stagewright.profiler.settings import ProfileSettings
from stagewright.profiler.surroundings import device_name, versions

_MEANING = 10  # of the numbers; entries and journals of another are not read


_SECONDS = ("action_s", "entrance_s", "step_s")


@dataclass(frozen=True)
class Overheads:
    """What a configuration costs beside its layers.

    Parameters
    ----------
    action_s : for each action.
    entrance_s : the part of a microbatch's two actions that a stage without predecessor is spared.
    step_s : for each step.
    parameters : of a shard, by class.
    unused : how many of these no forward uses.
    jitter : how single pieces of a microbatch differ from their medians; None where too few were measured.
    copy_bytes_per_s : how fast parameters are copied; None where there are none.
    """

    action_s: float
    entrance_s: float
    step_s: float
    parameters: Mapping[str, int]
    unused: Mapping[str, int]
    jitter: Jitter | None = None
    copy_bytes_per_s: float | None = None


@dataclass
class Costs:
    """Everything a profile needs, by configuration.

    `probe_s` is what a speed probe takes where the seconds are these; 0 where nobody knows.
    """

    classes: dict[Configuration, dict[str, ConfigurationCost]] = field(default_factory=dict)
    overheads: dict[Configuration, Overheads] = field(default_factory=dict)
    probe_s: float = 0.0

    def drop_incomplete(self, num_classes: int) -> None:
        """Leave out what is known in part only: the configurations that did not fit."""
        for item in self.missing(list(self.classes), num_classes):
            self.classes.pop(item, None)
            self.overheads.pop(item, None)

    def missing(self, configurations: Sequence[Configuration], num_classes: int) -> list[Configuration]:
        """Return the configurations that are not complete."""
        return [
            item
            for item in configurations
            if len(self.classes.get(item, {})) < num_classes or item not in self.overheads
        ]


class ProfileCache:
    """Reads and writes what one model's profile needs; without a folder it holds nothing."""

    def __init__(
        self, folder: Path | None, settings: ProfileSettings, chain: LayerChain, structures: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._entries = EntryCache(None if folder is None else folder / "layers")
        device = settings.torch_device
        self._common: dict[str, object] = {
            "meaning": _MEANING,
            "device": device_name(device),
            "versions": versions(device),
            "dtype": settings.dtype,
            "load": [settings.num_busy_ranks, settings.num_threads],
            "optimizer": settings.optimizer,
            "compiled": settings.compiled,
            "cache_policy": settings.cache_policy,
        }
        self._structures = structures
        class_of = {layer.name: layer.layer_class for layer in chain.layers}
        ties = [[tie.num_parameters, *(structures[class_of[name]] for name in tie.layers)] for tie in chain.ties]
        if ties:  # the gradient of a weight that layers share waits beside those between, which is their workspace
            self._common["ties"] = ties
        self._layers = [[layer.name, structures[layer.layer_class]] for layer in chain.layers]

    @property
    def damaged(self) -> list[str]:
        """Names of entries that could not be believed."""
        return self._entries.damaged

    def journal(self, *, resume: bool) -> Journal:
        """Open the journal of this model and these settings."""
        shapes = [_shape(item) for item in self._settings.configurations]
        key = {**self._common, "layers": self._layers, "shapes": shapes}
        return Journal(None if self._folder is None else self._folder / "journals", key, resume=resume)

    def read(self, configurations: Sequence[Configuration]) -> Costs:
        """Return what the cache holds of some configurations, at the speed of the entry that was found first."""
        costs = Costs()

        def factor(entry: Mapping[str, object]) -> float:
            probe_s = float(str(entry.get("probe_s", 0.0)))
            costs.probe_s = costs.probe_s or probe_s
            return costs.probe_s / probe_s if probe_s > 0 else 1.0

        for item in configurations:
            found = costs.classes.setdefault(item, {})
            for name in self._structures:
                entry = self._entries.get(self._class_key(name, item))
                if entry is not None:
                    found[name] = _scaled_cost(ConfigurationCost.model_validate(entry["cost"]), factor(entry))
            entry = self._entries.get(self._model_key(item))
            if entry is not None:
                seconds = [float(str(entry[name])) for name in _SECONDS]
                jitter = None if entry.get("jitter") is None else Jitter.model_validate(entry["jitter"])
                rate = None if entry.get("copy_bytes_per_s") is None else float(str(entry["copy_bytes_per_s"]))
                overheads = Overheads(*seconds, _counts(entry["parameters"]), _counts(entry["unused"]), jitter, rate)
                costs.overheads[item] = _scaled_overheads(overheads, factor(entry))
        return costs

    def write(self, costs: Costs, configurations: Sequence[Configuration]) -> None:
        """Keep what was measured of some configurations."""
        for item in configurations:
            for name, cost in costs.classes[item].items():
                content = {"cost": cost.model_dump(mode="json"), "probe_s": costs.probe_s}
                self._entries.put(self._class_key(name, item), content)
            value = costs.overheads[item]
            entry = {
                **{name: getattr(value, name) for name in _SECONDS},
                "parameters": dict(value.parameters),
                "unused": dict(value.unused),
                "jitter": None if value.jitter is None else value.jitter.model_dump(mode="json"),
                "copy_bytes_per_s": value.copy_bytes_per_s,
                "probe_s": costs.probe_s,
            }
            self._entries.put(self._model_key(item), entry)

    def _class_key(self, name: str, item: Configuration) -> dict[str, object]:
        return {**self._common, "layer": self._structures[name], "shape": _shape(item)}

    def _model_key(self, item: Configuration) -> dict[str, object]:
        return {**self._common, "layers": self._layers, "shape": _shape(item)}


def _shape(item: Configuration) -> list[int]:
    return [item.microbatch, item.sequence_length, item.tensor_degree]


def _scaled_cost(cost: ConfigurationCost, factor: float) -> ConfigurationCost:
    """Return the entry with all its seconds multiplied."""
    names = ("forward_s", "input_grad_s", "weight_grad_s", "split_excess_s", "optimizer_s")
    return cost.model_copy(
        update={
            **{name: getattr(cost, name) * factor for name in names},
            "recompute_s": {level: seconds * factor for level, seconds in cost.recompute_s.items()},
            "spread": {name: (low * factor, high * factor) for name, (low, high) in cost.spread.items()},
        }
    )


def _scaled_overheads(value: Overheads, factor: float) -> Overheads:
    jitter = value.jitter
    return replace(
        value,
        action_s=value.action_s * factor,
        entrance_s=value.entrance_s * factor,
        step_s=value.step_s * factor,
        jitter=None if jitter is None else jitter.model_copy(update={"piece_s": jitter.piece_s * factor}),
        copy_bytes_per_s=None if value.copy_bytes_per_s is None else value.copy_bytes_per_s / factor,
    )


def _counts(value: object) -> dict[str, int]:
    return {str(name): int(count) for name, count in value.items()} if isinstance(value, Mapping) else {}
