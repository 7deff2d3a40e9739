"""A model as a chain (or graph) of layers, and the segments of it that stages run.

A segment is called with the batch, which every stage sees, and with the values that layers outside it produced; it
returns the values that layers outside it need. A value is a tuple of tensors, keyed by the index of the layer that
produced it. The last layer's value is the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor, nn

from stagewright.modeling.batch import Batch
from stagewright.modeling.layer import Layer, Tie
from stagewright.planner.documents.document import canonical_json, digest_of
from stagewright.planner.errors import InvalidArgument

Values = Mapping[int, tuple[Tensor, ...]]


class Executor(Protocol):
    """Runs some of a model's layers."""

    def run(
        self, indices: tuple[int, ...], wanted: tuple[int, ...], batch: Batch, received: Values, seed: int | None
    ) -> dict[int, tuple[Tensor, ...]]:
        """Return the values of the layers `wanted`, after running the layers `indices`."""
        ...


@dataclass(frozen=True, eq=False)
class LayerChain:
    """Layers of a model in a topological order.

    Parameters
    ----------
    model : the module whose layers these are; segments share its parameters.
    ties : parameters that more than one layer holds.
    named_edges : (source, target) layer names of a graph; None for a chain.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    ties: tuple[Tie, ...]
    named_edges: tuple[tuple[str, str], ...] | None
    executor: Executor

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers, as profiles hold them."""
        return tuple(layer.name for layer in self.layers)

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(source, target) layer indices."""
        if self.named_edges is None:
            return tuple((index, index + 1) for index in range(self.num_layers - 1))
        position = {name: index for index, name in enumerate(self.layer_names)}
        return tuple(sorted((position[source], position[target]) for source, target in self.named_edges))

    @cached_property
    def layer_digest(self) -> str:
        """The `layer_digest` that a profile of this model has."""
        structure = {
            "layers": [[layer.name, layer.layer_class] for layer in self.layers],
            "classes": {layer.layer_class: [layer.kind, layer.num_parameters] for layer in self.layers},
            "edges": self.edges,
            "tied": [[tie.parameter, list(tie.layers)] for tie in self.ties],
        }
        return digest_of(canonical_json(structure))

    def segment(self, first: int, end: int) -> Segment:
        """Return layers `first` to `end` - 1; raises InvalidArgument outside the model."""
        if not 0 <= first < end <= self.num_layers:
            raise InvalidArgument(f"layers {first}..{end} are not within the model's 0..{self.num_layers}")
        return Segment(self, tuple(range(first, end)))

    def segment_of(self, indices: tuple[int, ...]) -> Segment:
        """Return the segment of any convex set of layers."""
        return Segment(self, tuple(sorted(indices)))


@dataclass(frozen=True, eq=False)
class Segment:
    """Some layers of a model, run together."""

    chain: LayerChain
    indices: tuple[int, ...]

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """Layers outside whose values the segment needs."""
        inside = set(self.indices)
        return tuple(sorted({s for s, t in self.chain.edges if t in inside and s not in inside}))

    @cached_property
    def results(self) -> tuple[int, ...]:
        """Layers inside whose values are needed outside, or the last layer of the model."""
        inside = set(self.indices)
        needed = {s for s, t in self.chain.edges if s in inside and t not in inside}
        if self.is_last:
            needed.add(self.chain.num_layers - 1)
        return tuple(sorted(needed))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The segment's layers."""
        return tuple(self.chain.layers[index] for index in self.indices)

    @property
    def is_first(self) -> bool:
        return not self.sources

    @property
    def is_last(self) -> bool:
        """Whether the segment ends with the loss."""
        return self.chain.num_layers - 1 in self.indices

    def __call__(
        self, batch: Batch, received: Values | None = None, *, seed: int | None = None
    ) -> dict[int, tuple[Tensor, ...]]:
        """Return the values of `results`; with a seed, each layer's random numbers depend on it and the layer only."""
        return self.chain.executor.run(self.indices, self.results, batch, received or {}, seed)

    def run(self, batch: Batch, *received: Tensor, seed: int | None = None) -> tuple[Tensor, ...]:
        """Return the value of a segment of a chain: its boundary tensors, or (loss,); `received` is its predecessor's."""
        values = self(batch, dict.fromkeys(self.sources, received), seed=seed)
        return values[self.results[-1]]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the segment's parameters by their name in the model, tied ones once."""
        every = dict(self.chain.model.named_parameters(remove_duplicate=False))
        result: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for index in self.indices:
            for name in self.chain.layers[index].parameters:
                if id(every[name]) not in seen:
                    seen.add(id(every[name]))
                    result[name] = every[name]
        return result
