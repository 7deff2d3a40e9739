"""Which parameters are matrices of a model's blocks, for optimizers that need whole matrices."""

from __future__ import annotations

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.expert_capacity import is_experts


def block_matrices(chain: LayerChain) -> frozenset[int]:
    """Return the ids of the parameters that are matrices of the model's blocks, those of experts in stacks included.

    Vectors of experts in a stack (biases) are none.
    """
    named = dict(chain.model.named_parameters(remove_duplicate=False))
    stacks = [module for module in chain.model.modules() if is_experts(module)]
    vectors = {id(value) for module in stacks for value in module.parameters(recurse=False) if value.dim() == 2}
    return frozenset(
        id(named[name])
        for layer in chain.layers
        if layer.kind == "block"
        for name in layer.parameters
        if name in named and named[name].dim() in (2, 3) and id(named[name]) not in vectors
    )
