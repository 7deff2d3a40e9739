"""Batches and how a model is called on one: the convention that users' models follow.

A batch is a mapping of keyword arguments (as Hugging Face models take them), a tuple of positional ones, or one tensor.
The model returns its loss: a scalar, an object or mapping with `loss`, or a tuple that begins with it. A model that
returns predictions instead is given the last element of a tuple batch as targets: cross-entropy for integer targets,
mean squared error for others. The loss is a mean over the samples, so that the loss of a batch is the mean of the
losses of its equal microbatches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stagewright.planner.errors import InvalidArgument

Batch = Mapping[str, Any] | tuple[Any, ...] | Tensor


class KeywordTuple(tuple[Any, ...]):
    """A batch of positional arguments with further keyword arguments."""

    keywords: Mapping[str, Any]

    def __new__(cls, values: Iterable[Any], keywords: Mapping[str, Any]) -> KeywordTuple:
        """Return the tuple of `values` with `keywords` beside it."""
        made = super().__new__(cls, values)
        made.keywords = keywords
        return made


def call_model(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Return the loss of a model on a batch; raises InvalidArgument when it gives none."""
    if isinstance(batch, Mapping):
        return loss_of(model(**batch), None)
    if isinstance(batch, Tensor):
        return loss_of(model(batch), None)
    inputs, targets = model_inputs(model, batch)
    return loss_of(model(*inputs, **getattr(batch, "keywords", {})), targets)


def model_inputs(model: Callable[..., Any], batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor | None]:
    """Return what a model is called with and the targets that are kept for the default loss (None when it takes all)."""
    forward = getattr(model, "forward", model)
    try:
        inspect.signature(forward).bind(*batch)
    except TypeError:
        return tuple(batch[:-1]), batch[-1]
    return tuple(batch), None


def loss_of(output: object, targets: Tensor | None) -> Tensor:
    """Return the scalar loss in a model's output, or the default loss against `targets`."""
    value: object = output
    if isinstance(output, Mapping):
        value = output.get("loss")
    elif not isinstance(output, Tensor) and getattr(output, "loss", None) is not None:
        value = output.loss  # type: ignore[attr-defined]
    elif isinstance(output, (tuple, list)) and output:
        value = output[0]
    if isinstance(value, Tensor) and value.dim() == 0:
        return value
    if isinstance(value, Tensor) and targets is not None:
        return default_loss(value, targets)
    raise InvalidArgument(
        f"the model returned {type(output).__name__} without a scalar loss",
        field="model",
        hint="return the loss from forward, or give batches (inputs, targets)",
    )


def default_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return mean cross-entropy for integer targets, mean squared error for others."""
    if targets.is_floating_point():
        return functional.mse_loss(predictions, targets)
    return functional.cross_entropy(predictions.reshape(-1, predictions.shape[-1]), targets.reshape(-1))


def divide_batch(batch: Batch, num_parts: int) -> list[Batch]:
    """Return `num_parts` equal parts along the first dimension; raises InvalidArgument when it does not divide."""
    size = batch_size(batch)
    if size % num_parts:
        raise InvalidArgument(f"a batch of {size} samples does not divide into {num_parts} microbatches", field="data")
    length = size // num_parts
    return [slice_batch(batch, index * length, length) for index in range(num_parts)]


def slice_batch(batch: Batch, start: int, length: int) -> Batch:
    """Return `length` samples of a batch from `start` on; what is no tensor, or a scalar, stays whole."""
    return _map(lambda value: value.narrow(0, start, length) if value.dim() else value, batch)


def select_samples(batch: Batch, samples: Tensor) -> Batch:
    """Return some samples of a batch, int64 [n]; what is no tensor, or a scalar, stays whole."""
    return _map(lambda value: value.index_select(0, samples.to(value.device)) if value.dim() else value, batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on a device."""
    return _map(lambda value: value.to(device), batch)


def batch_size(batch: Batch) -> int:
    """Return the number of samples, the first dimension of the first tensor that has one."""
    for value in batch_tensors(batch):
        if value.dim():
            return int(value.shape[0])
    raise InvalidArgument("the batch holds no tensor with a first dimension", field="data")


def batch_tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch in their order."""
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, Tensor)]


def shape_key(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a batch: equal on all ranks that see it."""
    return tuple(tuple(value.shape) for value in batch_tensors(batch))


def sample_key(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a batch without the number of samples."""
    return tuple(tuple(value.shape[1:]) for value in batch_tensors(batch))


def _map(change: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: change(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
    values = tuple(change(value) if isinstance(value, Tensor) else value for value in batch)
    return KeywordTuple(values, batch.keywords) if isinstance(batch, KeywordTuple) else values
