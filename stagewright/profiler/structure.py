"""What decides a layer's cost, as a digest: modules, shapes, dtypes and the code that runs.

Two layers with equal structure take equally long on one device; a changed forward gives a new digest even where names
and shapes stay.
"""

from __future__ import annotations

import inspect

from torch import nn

from stagewright.modeling import Layer, LayerChain
from stagewright.modeling.module_text import module_text
from stagewright.planner.documents.document import canonical_json, digest_of


def layer_structures(chain: LayerChain) -> dict[str, str]:
    """Return the digest of each layer class's structure."""
    first: dict[str, Layer] = {}
    for layer in chain.layers:
        first.setdefault(layer.layer_class, layer)
    return {name: _digest(chain, layer) for name, layer in first.items()}


def _digest(chain: LayerChain, layer: Layer) -> str:
    modules = [chain.model.get_submodule(path) for path in layer.modules] or [chain.model]
    parameters = dict(chain.model.named_parameters(remove_duplicate=False))
    shapes = [[list(parameters[name].shape), str(parameters[name].dtype)] for name in layer.parameters]
    whole = {
        "kind": layer.kind,
        "modules": [module_text(module) for module in modules],
        "shapes": shapes,
        "code": sorted({_code(part) for module in modules for part in module.modules()}),
        "between": _code(chain.model),
    }
    return digest_of(canonical_json(whole))


def _code(module: nn.Module) -> str:
    kind = type(module)
    if kind.__module__.startswith("torch."):
        return f"{kind.__module__}.{kind.__qualname__}"
    try:
        return digest_of(inspect.getsource(kind))
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"


def is_expert_parameter(name: str) -> bool:
    """Whether a parameter belongs to a routed expert, by its name."""
    return ".experts." in name
