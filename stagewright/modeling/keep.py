"""Keeping only some layers of a model: the others give their parameters up, and every use of them is noticed."""

from __future__ import annotations

import torch
from torch import nn

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.own_forward import placeholder


def keep_layers(chain: LayerChain, indices: frozenset[int]) -> None:
    """Drop the parameters of all other layers from the chain's model, in place.

    What belonged to a module of an absent layer becomes a parameter without data, on the meta device. What belonged to
    no layer's module (parameters of the model itself, used between layers) becomes a placeholder, so that a result that
    depends on it raises.
    """
    model = chain.model
    kept = {name for index in indices for name in chain.layers[index].parameters}
    dropped = {name for layer in chain.layers for name in layer.parameters} - kept
    in_modules = tuple(f"{path}." for layer in chain.layers for path in layer.modules if path)
    for name in sorted(dropped):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters[attribute]
        if parameter is None:
            continue
        if name.startswith(in_modules):
            empty = torch.empty_like(parameter, device="meta")
            module._parameters[attribute] = nn.Parameter(empty, requires_grad=False)
        else:
            del module._parameters[attribute]
            setattr(module, attribute, placeholder(parameter.shape, parameter))


def move_to(model: nn.Module, device: torch.device) -> None:
    """Move parameters and buffers to a device, in place; parameters without data stay without."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
