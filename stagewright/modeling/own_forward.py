"""Running some layers of a model through the model's own forward.

A segment with layers [first, end) runs the whole forward, in which

- layers before `first` are absent: their modules return placeholders in the structure of their output (see
  `absent_output`), without gradients;
- the entrance of layer `first` replaces the placeholder by the received tensors and switches gradients on;
- the entrance of layer `end` ends the forward: its tensor arguments are the segment's value.

So the code between two layers runs in the stage of the earlier one, and what does not depend on activations (masks,
positions, rotary tables) is made again in each stage, never sent. The loss has no module: its entrance is the output of
the last module.

A placeholder is a tensor subclass, and whatever is computed from it is one too. Once layer `first` is entered, the
placeholders it was called with stand for what was received: the forward may use these again (a residual around the layer, a
bias that every layer is given). Any other placeholder that reaches a present layer, the loss or the segment's value would be
a silent wrong result; it raises instead, naming the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stagewright.modeling.absent_output import change_tensors, fill_structure, input_key, output_structure
from stagewright.modeling.attention_mode import active_attention
from stagewright.modeling.batch import Batch, call_model
from stagewright.modeling.layer import Layer
from stagewright.modeling.seeding import seed_layer
from stagewright.planner.errors import InvalidArgument


class Placeholder(torch.Tensor):
    """A tensor of a layer that another stage holds; what is computed from it is a placeholder too.

    Its values mean nothing, and its shape may not be the real one: an operation that its shape does not admit returns
    one like it. What an operation returns is never the placeholder itself, so that each stands for one value only; after
    `stand_for` an operation on it is one on that value.
    """

    value: Tensor | None = None

    def stand_for(self, value: Tensor) -> None:
        """Let operations on this placeholder find a tensor instead."""
        self.value = value

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        args, kwargs = present((args, dict(kwargs or {})))
        if not any(isinstance(value, Placeholder) for value in leaves((args, kwargs))):
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__init__")
        if in_place and args and isinstance(args[0], Placeholder):
            return args[0]
        try:
            made = super().__torch_function__(function, types, args, kwargs)
        except (RuntimeError, IndexError, ValueError):
            absent = [value for value in args if isinstance(value, Placeholder)]
            if not absent:
                raise
            made = absent[0]
        if isinstance(made, Placeholder) and any(made is value for value in args):
            return placeholder(made.size(), made)
        return made


def placeholder(shape: tuple[int, ...] | torch.Size, like: Tensor, *, dtype: torch.dtype | None = None) -> Placeholder:
    """Return a placeholder that takes no memory."""
    return torch.zeros((), dtype=dtype or like.dtype, device=like.device).expand(shape).as_subclass(Placeholder)


def present(value: Any) -> Any:  # noqa: ANN401
    """Return a value with the tensors that its placeholders stand for in their place, within containers too."""
    if isinstance(value, Placeholder):
        return value if value.value is None else value.value
    if any(isinstance(part, Placeholder) and part.value is not None for part in leaves(value)):
        return change_tensors(value, present)
    return value


def leaves(value: object) -> Iterator[object]:
    """Yield a value's parts, within tuples, lists and mappings too."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from leaves(part)
    else:
        yield value


@dataclass
class _Frame:
    first: int
    end: int
    received: tuple[Tensor, ...]
    seed: int | None
    gradients: bool
    entered: int = -1
    value: tuple[Tensor, ...] = field(default=())


class _Reached(Exception):
    """The forward arrived at the first layer after the segment."""


class OwnForward:
    """Executor that cuts a model's own forward at the entrances of its layers."""

    def __init__(self, model: nn.Module, layers: tuple[Layer, ...]) -> None:
        self._model = model
        self._layers = layers
        self._frame: _Frame | None = None
        self._keys: dict[int, tuple[int | str, ...]] = {}
        self._modules = [
            (index, path, model.get_submodule(path)) for index, layer in enumerate(layers) for path in layer.modules
        ]
        self._firsts = {index: module for index, _, module in reversed(self._modules)}
        self._wrapped: dict[str, Callable[..., object]] = {}
        self._last: tuple[nn.Module, RemovableHandle] | None = None
        self._structures: dict[tuple[object, ...], object | None] = {}

    def run(
        self,
        indices: tuple[int, ...],
        wanted: tuple[int, ...],
        batch: Batch,
        received: Mapping[int, tuple[Tensor, ...]],
        seed: int | None,
    ) -> dict[int, tuple[Tensor, ...]]:
        """Return the value of the last layer of the run; `indices` are consecutive."""
        first, end = indices[0], indices[-1] + 1
        if first and first - 1 not in received:
            raise InvalidArgument(f"the segment from {self._layers[first].name!r} on received nothing")
        self._install()
        frame = _Frame(first, end, received.get(first - 1, ()), seed, torch.is_grad_enabled())
        self._frame = frame
        try:
            if first:
                torch.set_grad_enabled(False)
            else:
                self._enter(0, frame)
            loss = call_model(self._model, batch)
        except _Reached:
            return {end - 1: frame.value}
        except InvalidArgument:
            raise
        except Exception as error:
            if frame.entered >= 0:
                raise
            raise InvalidArgument(
                f"the model's forward cannot pass over the layers before {self._layers[first].name!r}: "
                f"{type(error).__name__}: {error}",
                field="model",
                hint=_HINT,
            ) from error
        finally:
            self._frame = None
            torch.set_grad_enabled(frame.gradients)
        if end < len(self._layers):
            raise InvalidArgument(
                f"the model's forward ended before layer {self._layers[end].name!r} was called",
                field="model",
                hint="give the model stagewright_layers(), which returns its layers by name in order",
            )
        if isinstance(loss, Placeholder):
            raise InvalidArgument(_message("loss"), field="model", hint=_HINT)
        return {end - 1: (loss,)}

    def _install(self) -> None:
        """Take over the layers' modules; a model without a running frame behaves as before.

        A module whose forward was replaced since the last run is taken over again.
        """
        for index, path, module in self._modules:
            if path not in self._wrapped:
                self._hook(index, module)
            if path not in self._wrapped or module.forward is not self._wrapped[path]:
                self._wrapped[path] = module.forward = partial(self._forward, index, module, module.forward)
        self._end_behind_other_hooks()

    def _end_behind_other_hooks(self) -> None:
        """Let what looks at the last module's output see it before the forward ends there, whoever came first."""
        if self._last is not None:
            module, handle = self._last
            if next(reversed(module._forward_hooks)) != handle.id:
                handle.remove()
                self._last = (module, module.register_forward_hook(self._after_last))

    def _hook(self, index: int, module: nn.Module) -> None:
        if index:
            is_first = module is self._firsts[index]
            entrance = partial(self._entrance if is_first else self._inside, index)
            module.register_forward_pre_hook(entrance, prepend=True, with_kwargs=True)
        if index == len(self._layers) - 2 and self._layers[-1].kind == "loss":
            self._last = (module, module.register_forward_hook(self._after_last))

    def _entrance(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        frame = self._frame
        if frame is None or index < frame.first:
            return None
        if index == frame.entered:
            return self._inside(index, module, args, kwargs)
        args, kwargs = present((args, kwargs))
        if index == frame.end:
            frame.value = self._boundary(index, args, kwargs)
            raise _Reached
        self._enter(index, frame)
        if index == frame.first:
            args, kwargs = self._replace(index, frame.received, args, kwargs)
        self._refuse_placeholders(index, (args, kwargs))
        return args, kwargs

    def _inside(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """A further module of a layer that consists of several, or its first one called again."""
        frame = self._frame
        if frame is None or index < frame.first:
            return None
        if index != frame.entered:
            raise self._out_of_order(index, frame)
        args, kwargs = present((args, kwargs))
        self._refuse_placeholders(index, (args, kwargs))
        return args, kwargs

    def _refuse_placeholders(self, index: int, values: object) -> None:
        if any(isinstance(value, Placeholder) for value in leaves(values)):
            raise InvalidArgument(_message(self._layers[index].name), field="model", hint=_HINT)

    def _enter(self, index: int, frame: _Frame) -> None:
        if index != self._expected(frame):
            raise self._out_of_order(index, frame)
        frame.entered = index
        if index == frame.first:
            torch.set_grad_enabled(frame.gradients)
        if frame.seed is not None:
            seed_layer(frame.seed, index)

    @staticmethod
    def _expected(frame: _Frame) -> int:
        return frame.first if frame.entered < 0 else frame.entered + 1

    def _out_of_order(self, index: int, frame: _Frame) -> InvalidArgument:
        called = self._layers[index].name
        expected = self._layers[min(self._expected(frame), len(self._layers) - 1)].name
        return InvalidArgument(
            f"the model calls layer {called!r} where {expected!r} was expected",
            field="model",
            hint="give the model stagewright_layers(), which returns its layers by name in order",
        )

    def _forward(
        self, index: int, module: nn.Module, own: Callable[..., object], /, *args: object, **kwargs: object
    ) -> object:
        frame = self._frame
        if frame is None or index >= frame.first:
            return own(*args, **kwargs)
        if index == frame.first - 1 and self._layers[frame.first].modules == ():
            return frame.received[0]
        structure = self._structure(index, module, args, kwargs)
        if structure is not None:
            like = frame.received[0]
            return fill_structure(structure, lambda part: placeholder(part.shape, like, dtype=part.dtype))
        if isinstance(module, nn.Embedding) and args and isinstance(args[0], Tensor):
            return placeholder((*args[0].shape, module.embedding_dim), frame.received[0])
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return placeholder(inputs[0].shape if index and inputs else frame.received[0].shape, frame.received[0])

    def _structure(
        self, index: int, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object | None:
        """Return the structure of an absent layer's output, None where it cannot be known."""
        key = (index, *input_key(args, kwargs))
        if key not in self._structures:
            frame, self._frame = self._frame, None
            try:
                divided = active_attention() is not None
                self._structures[key] = None if divided else output_structure(module, args, kwargs)
            finally:
                self._frame = frame
        return self._structures[key]

    def _after_last(self, module: nn.Module, args: object, output: Tensor) -> None:
        """The entrance of the loss."""
        frame = self._frame
        if frame is None:
            return
        loss = len(self._layers) - 1
        if frame.end == loss:
            frame.value = (output,)
            raise _Reached
        self._enter(loss, frame)

    def _boundary(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        places: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        if index not in self._keys:
            self._keys[index] = _activation_keys(places)
        value = tuple(places[key] for key in self._keys[index])
        self._refuse_placeholders(index, value)
        return value

    def _replace(
        self, index: int, received: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        places: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        keys = _placeholder_keys(places)
        if len(keys) != len(received):
            raise InvalidArgument(
                f"layer {self._layers[index].name!r} takes {len(keys)} activations, {len(received)} were received",
                field="model",
                hint=_HINT,
            )
        for key, value in zip(keys, received, strict=True):
            places[key].stand_for(value)
            places[key] = value
        return tuple(places[position] for position in range(len(args))), {key: places[key] for key in kwargs}


_HINT = "give the model stagewright_layers() and stagewright_edges(), so that what skips layers is carried"


def _message(name: str) -> str:
    return f"layer {name!r} uses a value of a layer that another stage holds"


def _activation_keys(places: Mapping[int | str, Any]) -> tuple[int | str, ...]:
    """Return the places of every tensor that depends on parameters, and of the first one that may be an activation."""
    tensors = [key for key, value in places.items() if isinstance(value, Tensor)]
    candidates = [key for key in tensors if places[key].is_floating_point()] or tensors
    return tuple(key for key in tensors if key == candidates[0] or places[key].requires_grad)


def _placeholder_keys(places: Mapping[int | str, Any]) -> tuple[int | str, ...]:
    return tuple(key for key, value in places.items() if isinstance(value, Placeholder))
