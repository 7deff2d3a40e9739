"""Recomputing a layer's forward in its backward: nothing of it, its attention, or all of it.

`full` keeps the layer's inputs only. `selective` keeps everything but the inside of attention (scores and weights), which
is run again from queries, keys and values. Random numbers are replayed: the generators' state at the layer's entrance is
kept, so dropout drops the same elements. Sequence slices see in the second run the keys and values that they saw in the
first.

Papers: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016; Korthikanti et al., Reducing Activation
Recomputation in Large Transformer Models, MLSys 2023 (selective).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from stagewright.modeling.attention_mode import AttentionMode, active_attention
from stagewright.modeling.chain import LayerChain
from stagewright.planner.documents.profile import Recompute


def recompute_layers(chain: LayerChain, levels: Mapping[int, Recompute]) -> None:
    """Give the layers their recomputation levels, in place; a layer without modules (the loss) has none."""
    for index, level in levels.items():
        for path in chain.layers[index].modules:
            recompute_module(chain.model.get_submodule(path), level)


def recompute_module(module: nn.Module, level: Recompute) -> None:
    """Give one module's forward a recomputation level, in place."""
    if level is Recompute.FULL:
        module.forward = partial(_full, module.forward)
    elif level is Recompute.SELECTIVE:
        module.forward = partial(_selective, module.forward)


def _full(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts(active_attention()), **kwargs)


def _selective(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
    with _CheckpointedAttention():
        return forward(*args, **kwargs)


class _CheckpointedAttention(TorchFunctionMode):
    """While active, the inside of `scaled_dot_product_attention` is recomputed in the backward."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            contexts = _contexts(active_attention())
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        return function(*args, **kwargs)


Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]


def _contexts(attention: AttentionMode | None) -> Callable[[], Contexts]:
    """Return the contexts of the first run and of the second, which sees the same slices."""
    if attention is None:
        return lambda: (nullcontext(), nullcontext())
    again = attention.again()
    return lambda: (nullcontext(), again)
