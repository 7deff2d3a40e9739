"""Hooks at every layer's boundary while the model's own forward and one fused backward run.

Layers are measured inside the running model, not alone: caches, allocator and neighbours are then those of a run, and
the layers' seconds add up to the model's by construction.

- Forward: a hook before each layer's module marks the end of the layer before it. What a model computes between two
  layers belongs to the earlier one, as in a stage. The loss, which has no module, begins where the last module ends.
- Backward: the engine executes ready nodes by the highest sequence number, hence layer after layer in reverse order. A
  hook on a layer's output fires when that gradient is complete, which is when the backward of all later layers is done,
  accumulation into `.grad` included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from stagewright.modeling import LayerChain

Tensors = Callable[[int, tuple[Tensor, ...]], object]
Left = Callable[[int], object]


def _ignore(index: int, tensors: tuple[Tensor, ...] = ()) -> None:
    """Do nothing."""


class LayerHooks:
    """A context in which the layers of a chain call back; `begin` comes before each forward.

    `entered(i, tensors)` is called when layer i begins, with its inputs that need a gradient (none for layer 0);
    `produced(i, tensors)` with the outputs of layer i that need one, the loss excepted; `left(i)` when the backward of
    all layers after i is done. No tensor is held here.
    """

    def __init__(
        self, chain: LayerChain, *, entered: Tensors = _ignore, produced: Tensors = _ignore, left: Left = _ignore
    ) -> None:
        self._chain = chain
        self._entered = entered
        self._produced = produced
        self._left = left
        self._next_index = 0
        self._hooked = WeakTensorKeyDictionary()  # by number alone, a new tensor could pass for one that is gone
        self._handles: list[RemovableHandle] = []

    def begin(self) -> None:
        """Start a forward: layer 0 is entered."""
        self._hooked.clear()
        self._enter(0, ())

    def expect(self, index: int) -> None:
        """Start a forward of a segment: `index` is the layer that will be entered first."""
        self._hooked.clear()
        self._next_index = index

    def __enter__(self) -> Self:
        chain = self._chain
        for index, layer in enumerate(chain.layers):
            if not layer.modules:
                continue
            first, last = chain.model.get_submodule(layer.modules[0]), chain.model.get_submodule(layer.modules[-1])
            if index:
                self._handles.append(first.register_forward_pre_hook(partial(self._before, index), with_kwargs=True))
            if chain.named_edges is not None and index < chain.num_layers - 1:
                self._handles.append(last.register_forward_hook(partial(self._after, index)))
            if index == chain.num_layers - 2 and not chain.layers[-1].modules:
                self._handles.append(last.register_forward_hook(self._before_loss))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, index: int, tensors: tuple[Tensor, ...]) -> None:
        self._next_index = index + 1
        if self._chain.named_edges is None and index:
            self._watch(index - 1, tensors)
        self._entered(index, tensors)

    def _watch(self, index: int, tensors: tuple[Tensor, ...]) -> None:
        self._produced(index, tensors)
        for tensor in tensors:
            if tensor not in self._hooked:
                self._hooked[tensor] = index
                tensor.register_hook(partial(self._after_backward, index))

    def _after_backward(self, index: int, gradient: Tensor) -> None:
        self._left(index)

    def _before(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if index == self._next_index:
            self._enter(index, differentiable((*args, *kwargs.values())))

    def _before_loss(self, module: nn.Module, args: object, output: object) -> None:
        if self._next_index == self._chain.num_layers - 1:
            self._enter(self._next_index, differentiable((output,)))

    def _after(self, index: int, module: nn.Module, args: object, output: object) -> None:
        self._watch(index, differentiable((output,)))


def differentiable(values: tuple[object, ...]) -> tuple[Tensor, ...]:
    """Return the tensors among values (tuples and lists looked into) that a gradient flows through."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(differentiable(tuple(value)))
    return tuple(found)
