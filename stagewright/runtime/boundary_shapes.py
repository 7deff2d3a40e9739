"""The shapes of what travels between stages, for a rank that runs without the others.

Each layer is run once on random values of the shapes its sources have, layers of one class on equal shapes only once.
Where the model was built without values, a layer is filled for its turn and emptied again, so memory is that of the
largest layer.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from stagewright.modeling.autocast import with_autocast
from stagewright.modeling.batch import Batch, to_device
from stagewright.modeling.keep import move_to
from stagewright.modeling.split import split
from stagewright.modeling.unfilled import fill_layers
from stagewright.planner.documents.plan import Plan
from stagewright.runtime.building import autocast_type
from stagewright.runtime.communication import TensorSpec
from stagewright.runtime.mailbox import batch_key
from stagewright.runtime.topology import has_unequal_replicas, stage_edges

Specs = tuple[TensorSpec, ...]


class BoundaryShapes:
    """Shapes of the layer values that cross stages, for one model under one plan.

    `model` is copied; its layers must not have been dropped yet.
    """

    def __init__(self, model: nn.Module, plan: Plan, device: torch.device) -> None:
        self._chain = with_autocast(split(copy.deepcopy(model)), autocast_type(plan), device)
        self._device = device
        move_to(self._chain.model, device)
        self._edges = stage_edges(plan, self._chain.edges)
        degrees = plan.stages[0].degrees
        self._parts = degrees.tp if degrees.sp else 1
        self._is_divided = has_unequal_replicas(plan)

    def messages(self, batch: Batch) -> dict[str, Specs]:
        """Return by key of the shape book what travels over each stage edge for a microbatch or slice like `batch`."""
        key = batch_key(batch, is_divided=self._is_divided)
        specs = self._specs(to_device(batch, self._device))
        return {
            f"shapes/{source}/{target}/{key}": tuple(
                spec for layer in layers for spec in self._divided(layer, specs[layer])
            )
            for (source, target), layers in self._edges.items()
        }

    def _specs(self, batch: Batch) -> dict[int, Specs]:
        """Return the shapes and dtypes of every layer's value but the loss."""
        found: dict[int, Specs] = {}
        known: dict[tuple[object, ...], Specs] = {}
        for index in range(self._chain.num_layers - 1):
            sources = sorted(source for source, target in self._chain.edges if target == index)
            key = (self._chain.layers[index].layer_class, *(found[source] for source in sources))
            if key not in known:
                known[key] = self._run(index, batch, {source: found[source] for source in sources})
            found[index] = known[key]
        return found

    def _run(self, index: int, batch: Batch, sources: dict[int, Specs]) -> Specs:
        received = {layer: tuple(_random(spec, self._device) for spec in specs) for layer, specs in sources.items()}
        was_empty = fill_layers(self._chain, frozenset((index,)), self._device)
        values = self._chain.executor.run((index,), (index,), batch, received, 0)[index]
        for module, attribute, empty in was_empty:
            module._parameters[attribute] = empty
        return tuple((tuple(value.shape), str(value.dtype).removeprefix("torch.")) for value in values)

    def _divided(self, layer: int, specs: Specs) -> Specs:
        """Return what one rank holds: between blocks, sequence parallelism divides dimension 1."""
        if self._parts == 1 or self._chain.layers[layer].kind != "block":
            return specs
        return tuple(
            ((shape[0], shape[1] // self._parts, *shape[2:]) if len(shape) > 2 else shape, dtype)
            for shape, dtype in specs
        )


def _random(spec: TensorSpec, device: torch.device) -> Tensor:
    shape, dtype = spec
    value = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
    return value.normal_().requires_grad_() if value.is_floating_point() else value
