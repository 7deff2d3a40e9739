"""The shapes of what travels between stages, found on the meta device: no values, no memory.

A stage that runs alone must know the shapes of what it would receive. The layers before each boundary are run on tensors
without values, once for each shape of batch.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from stagewright.modeling.batch import Batch, shape_key, to_device
from stagewright.modeling.chain import LayerChain
from stagewright.modeling.split import split
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.communication import TensorSpec
from stagewright.runtime.topology import stage_edges

META = torch.device("meta")


class BoundaryShapes:
    """Shapes of the layer values that cross stages, for one model under one plan.

    `model` is copied to the meta device; its layers must not have been dropped yet.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._chain = split(copy.deepcopy(model).to(META))
        self._edges = stage_edges(plan, self._chain.edges)
        degrees = plan.stages[0].degrees
        self._parts = degrees.tp if degrees.sp else 1

    def messages(self, batch: Batch) -> dict[str, tuple[TensorSpec, ...]]:
        """Return by key of the shape book what travels over each stage edge for a microbatch or slice like `batch`."""
        key = repr(shape_key(batch))
        layers = sorted({layer for crossing in self._edges.values() for layer in crossing})
        specs = {layer: self._specs(layer, values) for layer, values in self._values(layers, batch).items()}
        return {
            f"shapes/{source}/{target}/{key}": tuple(spec for layer in crossing for spec in specs[layer])
            for (source, target), crossing in self._edges.items()
        }

    def _values(self, layers: list[int], batch: Batch) -> dict[int, tuple[torch.Tensor, ...]]:
        chain, empty = self._chain, to_device(batch, META)
        try:
            if chain.named_edges is None:
                return {layer: chain.segment(0, layer + 1)(empty)[layer] for layer in layers}
            return chain.executor.run(tuple(range(chain.num_layers)), tuple(layers), empty, {}, None)
        except (RuntimeError, NotImplementedError) as error:
            raise InvalidArgument(
                f"the model's forward looks at values, so its boundary shapes cannot be found without them: {error}",
                field="replay",
                hint="run the plan, or emulate it with --emulate",
            ) from error

    def _specs(self, layer: int, values: tuple[torch.Tensor, ...]) -> tuple[TensorSpec, ...]:
        """Return shapes and dtypes; between blocks, sequence parallelism divides dimension 1."""
        parts = self._parts if _is_divided(self._chain, layer) else 1
        return tuple(
            (
                tuple(
                    size // parts if dimension == 1 and value.dim() > 2 else size
                    for dimension, size in enumerate(value.shape)
                ),
                str(value.dtype).removeprefix("torch."),
            )
            for value in values
        )


def _is_divided(chain: LayerChain, layer: int) -> bool:
    return chain.layers[layer].kind == "block"
