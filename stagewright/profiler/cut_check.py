"""Where a chain cannot be cut: layers that use a value of an earlier one which the layer before them does not hand on.

Every layer is run alone, as a stage of its own, on what the layer before it gave. Where one is refused, stages that begin
earlier and end with it are tried, the latest first, until one holds whatever the layer uses: those before that are refused
too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stagewright.modeling import Batch, LayerChain
from stagewright.planner.errors import InvalidArgument

_Values = Mapping[int, tuple[Tensor, ...]]


def refused_layers(chain: LayerChain, batch: Batch) -> dict[str, str]:
    """Return the layers that cannot begin a stage, by name in model order, with the reason; a graph's edges say it themselves."""
    if chain.named_edges is not None:
        return {}
    refused: dict[int, str] = {}
    given: list[_Values] = [{}, chain.segment(0, 1)(batch)]
    for index in range(1, chain.num_layers):
        value, message = _run(chain, batch, given[index], index, index + 1)
        if value is None:
            for first in range(index, 0, -1):
                _, earlier = (None, message) if first == index else _run(chain, batch, given[first], first, index + 1)
                if earlier is None:
                    break
                refused.setdefault(first, earlier)
            value = chain.segment(0, index + 1)(batch)
        given.append(value)
    return {chain.layer_names[index]: refused[index] for index in sorted(refused)}


def _run(chain: LayerChain, batch: Batch, given: _Values, first: int, end: int) -> tuple[_Values | None, str | None]:
    """Return what layers `first` to `end` - 1 give as a stage, or why they cannot be one."""
    try:
        return chain.segment(first, end)(batch, _apart(given)), None
    except torch.OutOfMemoryError:
        raise
    except InvalidArgument as error:
        return None, error.message
    except Exception as error:  # whatever the model's code raises where it finds something other than in the whole
        return None, f"{type(error).__name__}: {error}"


def _apart(values: _Values) -> dict[int, tuple[Tensor, ...]]:
    """Return the values as another stage receives them."""
    with torch.no_grad():
        return {
            index: tuple(part.detach().requires_grad_(part.is_floating_point()) for part in parts)
            for index, parts in values.items()
        }
