"""Global batches of the right size from a user's data factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from stagewright.modeling.batch import Batch, batch_size, slice_batch
from stagewright.modeling.factory import load_object
from stagewright.modeling.guessed_batch import guessed_batch
from stagewright.modeling.hugging_face import is_huggingface
from stagewright.planner.errors import InvalidArgument


def open_data(
    reference: str | None, model_reference: str, model: nn.Module, *, samples: int, sequence_length: int
) -> Iterator[Batch]:
    """Yield batches of `samples` samples, the same on every rank.

    Without a reference the model's own file is asked for `data`; else random inputs are guessed (`guessed_batch`).

    Raises
    ------
    InvalidArgument : when there is no data, or it ends before one batch is full.
    """
    factory = load_object(reference) if reference is not None else _data_beside(model_reference)
    if factory is None:
        return _guessed(model, samples, sequence_length)
    return _regroup(_call(factory, samples, sequence_length), samples)


def _data_beside(model_reference: str) -> object | None:
    if is_huggingface(model_reference):
        return None
    place = model_reference.rpartition(":")[0]
    try:
        return load_object(f"{place}:data")
    except InvalidArgument:
        return None


def _call(factory: Any, samples: int, sequence_length: int) -> Iterator[Batch]:  # noqa: ANN401
    """Return the factory's batches; it is told the sizes when it has parameters for them."""
    offered = {"batch_size": samples, "sequence_length": sequence_length}
    if isinstance(factory, Callable):
        wanted = inspect.signature(factory).parameters
        factory = factory(**{name: value for name, value in offered.items() if name in wanted})
    return iter(factory)


def _regroup(batches: Iterator[Batch], samples: int) -> Iterator[Batch]:
    kept: Batch | None = None
    for batch in batches:
        kept = batch if kept is None else _join(kept, batch)
        while batch_size(kept) >= samples:
            yield slice_batch(kept, 0, samples)
            rest = batch_size(kept) - samples
            if rest == 0:
                kept = None
                break
            kept = slice_batch(kept, samples, rest)
    raise InvalidArgument(
        f"the data ended before a batch of {samples} samples was full", field="data", hint="yield batches without end"
    )


def _join(first: Batch, second: Batch) -> Batch:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat((first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return {key: _joined(value, second[key]) for key, value in first.items()}
    return tuple(_joined(a, b) for a, b in zip(first, second, strict=True))


def _joined(first: Any, second: Any) -> Any:  # noqa: ANN401
    return torch.cat((first, second)) if isinstance(first, Tensor) and first.dim() else first


def _guessed(model: nn.Module, samples: int, sequence_length: int) -> Iterator[Batch]:
    """Yield random batches that fit the model, without touching the random numbers that it draws."""
    for seed in count():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            batch = guessed_batch(model, samples, sequence_length)
        yield batch
