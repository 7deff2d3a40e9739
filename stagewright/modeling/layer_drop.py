"""LayerDrop (Fan et al., 2019) leaves layers out at random in training; a layer that a stage holds always runs."""

from __future__ import annotations

from torch import nn

_SUFFIX = "layerdrop"


def switch_off_layer_drop(model: nn.Module) -> float:
    """Set every probability of leaving a layer out to 0, in modules and configurations; returns the greatest there was."""
    holders = {id(holder): holder for module in model.modules() for holder in (module, getattr(module, "config", None))}
    greatest = 0.0
    for holder in holders.values():
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            if name.endswith(_SUFFIX) and isinstance(value, float) and value > 0.0:
                greatest = max(greatest, value)
                setattr(holder, name, 0.0)
    return greatest
