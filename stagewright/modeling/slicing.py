"""Parts of a batch along its sequence, with the positions and the loss weight of each part.

A model whose forward takes `position_ids` (as Hugging Face's do) or `positions` is given the positions of the part. One
that takes neither is run as it is, which is right only when it has no notion of position.

The loss of a plain model is a mean over its tokens, so a part counts by its share of them. A Hugging Face language model
shifts its labels inside the loss, across the cut; it is given labels that are shifted already (`shift_labels`) and the
number of tokens to divide by, so its parts simply add up.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stagewright.modeling.batch import Batch, KeywordTuple, batch_tensors
from stagewright.planner.errors import InvalidArgument


@dataclass(frozen=True)
class SequencePart:
    """A part of a microbatch and what its loss counts in the microbatch's."""

    batch: Batch
    loss_weight: float


def sequence_length(batch: Batch) -> int:
    """Return the sequence length, the second dimension of the first tensor that has one."""
    for value in batch_tensors(batch):
        if value.dim() >= 2:
            return int(value.shape[1])
    raise InvalidArgument("the batch has no tensor with a sequence dimension", field="data")


def equal_lengths(total: int, num_parts: int) -> tuple[int, ...]:
    """Return lengths that differ by at most one, longer ones first."""
    if total < num_parts:
        raise InvalidArgument(f"a sequence of {total} does not divide into {num_parts} slices", field="num_slices")
    return tuple(total // num_parts + (index < total % num_parts) for index in range(num_parts))


def divide_sequence(batch: Batch, model: nn.Module, lengths: Sequence[int]) -> list[SequencePart]:
    """Return consecutive parts of these lengths."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    total = sum(lengths)
    positions = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return [select_sequence(batch, model, chosen, total) for chosen in positions]


def select_sequence(batch: Batch, model: nn.Module, positions: Tensor, total: int) -> SequencePart:
    """Return the part of a batch at these positions of its sequence of `total`."""
    if sequence_length(batch) != total:
        raise InvalidArgument(f"the sequence is {sequence_length(batch)} long, {total} was expected", field="data")
    keyword = position_keyword(model)
    first = batch_tensors(batch)[0]
    keywords: dict[str, object] = {}
    if keyword is not None:
        places = positions.to(first.device)
        keywords[keyword] = places[None].expand(first.shape[0], -1) if keyword == "position_ids" else places
    weight = len(positions) / total
    if isinstance(batch, Mapping) and "labels" in batch and hasattr(model, "loss_function"):
        batch, extra = _shifted(batch, model)
        keywords.update(extra)
        weight = 1.0 if "num_items_in_batch" in extra else weight
    part = _select(batch, positions, total)
    if isinstance(part, Mapping):
        return SequencePart({**part, **keywords}, weight)
    if isinstance(part, Tensor):
        return SequencePart(KeywordTuple((part,), keywords), weight)
    return SequencePart(KeywordTuple(part, keywords), weight)


def position_keyword(model: nn.Module) -> str | None:
    """Return the parameter of a model's forward that takes positions."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("position_ids", "positions") if name in parameters), None)


def _shifted(batch: Mapping[str, object], model: nn.Module) -> tuple[Mapping[str, object], dict[str, object]]:
    labels = batch["labels"]
    assert isinstance(labels, Tensor)
    if "CausalLM" not in getattr(model.loss_function, "__name__", ""):
        return batch, {}
    shifted = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)
    return {**batch, "shift_labels": shifted}, {"num_items_in_batch": int((shifted != -100).sum())}


def _select(batch: Batch, positions: Tensor, total: int) -> Batch:
    def choose(value: object) -> object:
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == total:
            return value.index_select(1, positions.to(value.device))
        return value

    if isinstance(batch, Tensor):
        chosen = choose(batch)
        assert isinstance(chosen, Tensor)
        return chosen
    if isinstance(batch, Mapping):
        return {key: choose(value) for key, value in batch.items()}
    return tuple(choose(value) for value in batch)
