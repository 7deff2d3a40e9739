"""Running explicit layers: each is called with what its sources in the graph returned.

The first layers (without a source) are called with the batch's inputs. A layer whose `forward` names keys of a mapping
batch gets those by keyword. The value of the last layer is the model's output: its loss, or predictions that are
compared with the batch's targets.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from stagewright.modeling.batch import Batch, loss_of
from stagewright.modeling.layer import Layer
from stagewright.modeling.seeding import seed_layer
from stagewright.planner.errors import InvalidArgument


class LayerList:
    """Executor of a model that lists its layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[Layer, ...],
        modules: tuple[nn.Module, ...],
        edges: tuple[tuple[str, str], ...] | None,
    ) -> None:
        self._names = tuple(layer.name for layer in layers)
        self._modules = modules
        position = {name: index for index, name in enumerate(self._names)}
        if edges is None:
            pairs = [(index, index + 1) for index in range(len(layers) - 1)]
        else:
            pairs = [(position[source], position[target]) for source, target in edges]
        self._sources = tuple(tuple(s for s, t in pairs if t == index) for index in range(len(layers)))
        self._keywords = tuple(_keywords(module) for module in modules)

    def run(
        self,
        indices: tuple[int, ...],
        wanted: tuple[int, ...],
        batch: Batch,
        received: Mapping[int, tuple[Tensor, ...]],
        seed: int | None,
    ) -> dict[int, tuple[Tensor, ...]]:
        """Return the values of the layers `wanted`, after running the layers `indices`."""
        values = dict(received)
        last = len(self._modules) - 1
        for index in indices:
            if seed is not None:
                seed_layer(seed, index)
            output = self._call(index, batch, values)
            if index == last:
                targets = batch[-1] if isinstance(batch, tuple) and len(batch) > 1 else None
                values[index] = (loss_of(output, targets),)
            else:
                values[index] = output if isinstance(output, tuple) else (output,)
        return {index: values[index] for index in wanted}

    def _call(self, index: int, batch: Batch, values: Mapping[int, tuple[Tensor, ...]]) -> object:
        keywords = {}
        if isinstance(batch, Mapping):
            keywords = {key: batch[key] for key in self._keywords[index] if key in batch}
        if self._sources[index]:
            inputs = tuple(value for source in self._sources[index] for value in values[source])
            return self._modules[index](*inputs, **keywords)
        if isinstance(batch, Tensor):
            return self._modules[index](batch)
        if isinstance(batch, Mapping):
            if not keywords:
                raise InvalidArgument(
                    f"layer {self._names[index]!r} takes none of the batch's {sorted(batch)}", field="data"
                )
            return self._modules[index](**keywords)
        return self._modules[index](*(batch[:-1] if len(batch) > 1 else batch))


def _keywords(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)
