"""Models larger than memory: built without values, so that one rank fills only what it keeps.

While `without_values` is active every parameter that a module registers is on the meta device, whatever made it; buffers
(rotary tables, masks) are real. A model whose factory looks at the values of its parameters cannot be built so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stagewright.modeling.chain import LayerChain

STANDARD_DEVIATION = 0.02


@contextmanager
def without_values() -> Iterator[None]:
    """Let modules hold parameters without values."""
    register = nn.Module.register_parameter

    def register_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            empty = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def fill_layers(
    chain: LayerChain, indices: frozenset[int], device: torch.device
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Give the parameters of these layers that have no values random ones, in place; returns where and what they were.

    Matrices are normal with a small deviation, vectors 1 where they scale and 0 where they shift.
    """
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    every = dict(chain.model.named_parameters(remove_duplicate=False))
    filled: dict[int, nn.Parameter] = {}
    for index in sorted(indices):
        for name in chain.layers[index].parameters:
            if not every[name].is_meta:
                continue
            path, _, attribute = name.rpartition(".")
            if id(every[name]) not in filled:
                filled[id(every[name])] = _filled(every[name], attribute, device)
            module = chain.model.get_submodule(path)
            before.append((module, attribute, every[name]))
            module._parameters[attribute] = filled[id(every[name])]
    return before


def _filled(parameter: nn.Parameter, attribute: str, device: torch.device) -> nn.Parameter:
    value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    with torch.no_grad():
        if value.dim() > 1:
            value.normal_(0.0, STANDARD_DEVIATION)
        else:
            value.fill_(0.0 if attribute.endswith("bias") else 1.0)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
