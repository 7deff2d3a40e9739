"""What an absent layer returns: the structure of its output, found once by running it without data.

A layer that another stage holds is passed over in the model's own forward. Code between layers may unpack what the layer
returned (hidden states beside a position bias, a state, a size), so the structure must be the real one: tuples, lists and
mappings are kept, tensors stand for their shape and dtype, everything else stays as it is.

The structure is that of one call on the meta device, with parameters and inputs of the shapes at hand, and is kept by
the shapes of the inputs. Where a layer's code looks at a value there (is this mask all true?), it finds true or one. A
layer that cannot run there all the same has no structure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorShape:
    """Stands for a tensor of an output."""

    shape: Shape
    dtype: torch.dtype


def input_key(args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[object, ...]:
    """Return what the structure of an output depends on: the shapes of the tensors a layer is called with."""
    values = (*args, *(kwargs[name] for name in sorted(kwargs)))
    return tuple(tuple(value.shape) if isinstance(value, Tensor) else type(value) for value in values)


def output_structure(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object | None:
    """Return a layer's output with a TensorShape for each tensor; None when it cannot run without data."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
    inputs = change_tensors((args, dict(kwargs)), _on_meta)
    assert isinstance(inputs, tuple)
    try:
        with torch.no_grad(), _TrueValues():
            output = functional_call(module, state, inputs[0], inputs[1])
    except Exception:  # whatever a user's layer raises on the meta device: it has no structure then
        return None
    return change_tensors(output, lambda value: TensorShape(tuple(value.shape), value.dtype))


class _TrueValues(TorchDispatchMode):
    """Answers with true or one where a value is asked for that does not exist."""

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if function is torch.ops.aten._local_scalar_dense.default:
            assert isinstance(args[0], Tensor)
            return torch.ones((), dtype=args[0].dtype).item()
        return function(*args, **(kwargs or {}))


def change_tensors(value: object, change: Callable[[Tensor], object]) -> object:
    """Return a value with its tensors changed, within tuples, lists and mappings too."""
    if isinstance(value, Tensor):
        return change(value)
    return _rebuilt(value, lambda part: change_tensors(part, change))


def fill_structure(structure: object, fill: Callable[[TensorShape], Tensor]) -> object:
    """Return the output that a structure stands for, with a tensor from `fill` at each TensorShape."""
    if isinstance(structure, TensorShape):
        return fill(structure)
    return _rebuilt(structure, lambda part: fill_structure(part, fill))


def _rebuilt(value: object, change: Callable[[object], object]) -> object:
    if isinstance(value, Mapping):
        made = copy.copy(value)
        for name, part in value.items():
            made[name] = change(part)  # type: ignore[index]
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(change, value))
    return value


def _on_meta(value: Tensor) -> Tensor:
    return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
