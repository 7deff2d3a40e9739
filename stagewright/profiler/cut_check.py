"""Where a chain cannot be cut: layers that use a value of an earlier one which the layer before them does not hand on.

Every layer is run alone, as a stage of its own, on what the layer before it gave.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stagewright.modeling import Batch, LayerChain
from stagewright.planner.errors import InvalidArgument


def refused_layers(chain: LayerChain, batch: Batch) -> dict[str, str]:
    """Return the layers that cannot begin a stage, by name, with the reason; a graph's edges say it themselves."""
    if chain.named_edges is not None:
        return {}
    refused: dict[str, str] = {}
    received = chain.segment(0, 1)(batch)
    for index in range(1, chain.num_layers):
        try:
            received = chain.segment(index, index + 1)(batch, _apart(received))
        except InvalidArgument as error:
            refused[chain.layer_names[index]] = error.message
            received = chain.segment(0, index + 1)(batch)
    return refused


def _apart(values: Mapping[int, tuple[Tensor, ...]]) -> dict[int, tuple[Tensor, ...]]:
    """Return the values as another stage receives them."""
    with torch.no_grad():
        return {
            index: tuple(part.detach().requires_grad_(part.is_floating_point()) for part in parts)
            for index, parts in values.items()
        }
