"""What of a module's tensors one of several tensor-parallel ranks holds, as a tensor plan says; nothing here communicates."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from stagewright.modeling.tensor_families import ModuleSplit
from stagewright.planner.errors import InvalidArgument


@dataclass(frozen=True)
class CutTensor:
    """A parameter that is split.

    Parameters
    ----------
    path : of the module that has it.
    name : in the module.
    dimension : along which it is split.
    parts : relative sizes of what lies one behind the other there.
    of_key_values : whether it is of keys or values, whose heads may be fewer than the ranks.
    """

    path: str
    name: str
    dimension: int
    parts: tuple[int, ...] = (1,)
    of_key_values: bool = False


def cut_tensors(model: nn.Module, path: str, how: ModuleSplit) -> Iterator[CutTensor]:
    """Yield the parameters of a module, or the one of that path, that are split; raises InvalidArgument for an unknown layer."""
    owner, _, name = path.rpartition(".")
    if how.role == "heads" and name in model.get_submodule(owner)._parameters:
        yield CutTensor(owner, name, 0)
        return
    module = model.get_submodule(path)
    if how.role == "heads":
        for name, value in module.named_parameters(recurse=False):
            pairs = value.shape[0] == num_key_value_heads(model)
            yield CutTensor(path, name, int(isinstance(module, nn.Embedding)), of_key_values=pairs)
    elif how.role == "norm":
        yield CutTensor(path, "weight", 0, of_key_values=_makes_key_values(model, owner, module.weight.shape[0]))
    elif how.role == "vocabulary" and isinstance(module, nn.Embedding):
        yield CutTensor(path, "weight", 0)
    elif how.role in ("column", "row", "vocabulary"):
        if not isinstance(module, nn.Linear) and not is_transposed(module):
            raise InvalidArgument(
                f"{path!r} is {type(module).__name__}, tensor parallelism splits nn.Linear", field="degrees.tp"
            )
        outputs, parts = int(is_transposed(module)), tuple(int(part) for part in how.parts)
        pairs = how.role == "column" and _makes_key_values(model, owner, module.weight.shape[outputs])
        yield CutTensor(path, "weight", 1 - outputs if how.role == "row" else outputs, parts, pairs)
        if how.role != "row" and module.bias is not None:
            yield CutTensor(path, "bias", 0, parts, pairs)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's Conv1D, a linear layer whose weight is transposed."""
    return type(module).__name__ == "Conv1D"


def tell_module(model: nn.Module, path: str, how: ModuleSplit, size: int, index: int) -> None:
    """Let a module know what one of `size` ranks has: of the numbers that it keeps, and of arguments with values for each head."""
    if how.counts:
        _divide_counts(path, model.get_submodule(path), how.counts, size)
    if how.head_arguments:
        hook = partial(_own_heads, how.head_arguments, num_heads(model) or size, size, index)
        model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)


def _divide_counts(path: str, module: nn.Module, names: tuple[str, ...], size: int) -> None:
    """Divide numbers that a module keeps; one in an object that it shares with others, in a copy of that object."""
    for name in names:
        owner: object = module
        place, _, last = name.rpartition(".")
        if place:
            owner = copy(getattr(module, place))
            setattr(module, place, owner)
        value = getattr(owner, last)
        if value % size:
            raise InvalidArgument(f"{path}.{name} is {value}, which tp = {size} does not divide", field="degrees.tp")
        setattr(owner, last, value // size)


def _own_heads(
    names: tuple[str, ...],
    num_heads: int,
    size: int,
    index: int,
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Keep a rank's heads of arguments: of [samples, heads, ...], or of [samples times heads, ...] in three dimensions."""

    def own(value: Tensor) -> Tensor:
        if value.dim() == 3:
            return own(value.unflatten(0, (-1, num_heads))).flatten(0, 1)
        return value.chunk(size, dim=1)[index] if value.shape[1] == num_heads else value

    return args, {
        name: own(value) if name in names and isinstance(value, Tensor) else value for name, value in kwargs.items()
    }


def lying_parts(value: Tensor, dimension: int, parts: tuple[int, ...]) -> list[Tensor]:
    """Return views of what lies one behind the other along a dimension, in these relative sizes."""
    unit = value.shape[dimension] // sum(parts)
    return list(torch.split(value, [unit * part for part in parts], dim=dimension))


def divides(size: int, parts: tuple[int, ...], count: int) -> bool:
    """Whether each of the parts of a size divides evenly by `count`."""
    unit, rest = divmod(size, sum(parts))
    return not rest and all(unit * part % count == 0 for part in parts)


def num_heads(model: nn.Module) -> int | None:
    """Return the attention heads that the model's configuration tells of; None when it does not."""
    return _told_heads(model, "num_attention_heads")


def num_key_value_heads(model: nn.Module) -> int | None:
    """Return the key-value heads that the model's configuration tells of; None when it does not."""
    return _told_heads(model, "num_key_value_heads")


def key_value_copies(model: nn.Module, size: int) -> int:
    """Return how many of `size` tensor-parallel ranks hold one key-value head between them; 1 when each has its own."""
    heads = num_key_value_heads(model)
    return size // heads if heads and heads < size and size % heads == 0 else 1


def _told_heads(model: nn.Module, name: str) -> int | None:
    config = getattr(model, "config", None)
    heads = getattr(getattr(config, "text_config", config), name, None)
    return heads if isinstance(heads, int) else None


def _makes_key_values(model: nn.Module, owner: str, features: int) -> bool:
    size, count = getattr(model.get_submodule(owner), "head_dim", None), num_key_value_heads(model)
    return isinstance(size, int) and features == size * (count or 0)
