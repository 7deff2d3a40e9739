"""Where a model to measure comes from, and batches it can be called with.

A model is `module:factory`, `path.py:factory`, the path of a Hugging Face `config.json` (or its directory), or a module
at hand. Batches come from, in this order: a data factory that is named, the function `data` beside the model's factory,
the Hugging Face configuration, or the shape of the model's first layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagewright.modeling import Batch, LayerChain, load_object, split
from stagewright.modeling.batch import batch_size, slice_batch, to_device
from stagewright.modeling.guessed_batch import guessed_batch
from stagewright.modeling.hugging_face import huggingface_model, is_huggingface
from stagewright.planner.errors import InvalidArgument, StagewrightError
from stagewright.planner.models.hugging_face import config_name, config_path
from stagewright.profiler.tensor_shard import shard_model


@dataclass(frozen=True)
class ModelSource:
    """A model by name, with what builds it and what it is fed.

    Parameters
    ----------
    reference : what names it; None for a module at hand.
    module : the module at hand, when there is no reference.
    data : reference of a data factory, or None.
    layers : pattern of the modules that are layers, or None.
    """

    reference: str | None = None
    module: nn.Module | None = None
    data: str | None = None
    layers: str | None = None

    @property
    def name(self) -> str:
        """Return a short name of the model."""
        if self.module is not None or self.reference is None:
            return type(self.module).__name__
        if is_huggingface(self.reference):
            return config_name(config_path(self.reference))
        place, _, factory = self.reference.rpartition(":")
        return f"{Path(place).stem}:{factory}"

    def build(
        self, *, device: torch.device, dtype: torch.dtype, num_layers: int | None = None, tensor_degree: int = 1
    ) -> nn.Module:
        """Return the model in training mode.

        Parameters
        ----------
        num_layers : shorten the model: a Hugging Face configuration, or a factory that takes `num_layers`.
        tensor_degree : build one shard: by the model's tensor-parallel plan, or a factory that takes `tensor_degree`.

        Raises
        ------
        InvalidArgument : when the reference names nothing that is a module, or it cannot be shortened or cut.
        """
        if self.module is not None:
            _refuse_changes(num_layers, tensor_degree)
            return self.module.to(device=device, dtype=dtype).train()
        assert self.reference is not None
        if is_huggingface(self.reference):
            with torch.device(device):
                model = huggingface_model(self.reference, num_layers=num_layers)
        else:
            factory = load_object(self.reference)
            if not callable(factory):
                raise InvalidArgument(f"{self.reference!r} is no function that returns a model", field="model")
            told = _told(factory, num_layers, tensor_degree)
            with torch.device(device):
                model = _made(self.reference, factory, told)
            if not isinstance(model, nn.Module):
                raise InvalidArgument(
                    f"{self.reference!r} returned {type(model).__name__}, not a torch module", field="model"
                )
            tensor_degree = 1 if "tensor_degree" in told else tensor_degree
        shard_model(model, tensor_degree)
        return model.to(dtype=dtype).train()

    def split(self, model: nn.Module) -> LayerChain:
        """Return the model cut into its layers."""
        return split(model, pattern=self.layers)

    def batch(self, model: nn.Module, microbatch: int, sequence_length: int, device: torch.device) -> Batch:
        """Return one microbatch; raises InvalidArgument when it cannot be guessed or is too small."""
        factory = self._data_factory()
        if factory is not None:
            value = first_batch(factory, microbatch, sequence_length)
        else:
            torch.manual_seed(microbatch)
            value = guessed_batch(model, microbatch, sequence_length)
        if batch_size(value) < microbatch:
            raise InvalidArgument(
                f"the data factory gives {batch_size(value)} samples a batch, {microbatch} are to be measured",
                field="data",
                hint="let it take batch_size, or measure smaller microbatches",
            )
        return to_device(slice_batch(value, 0, microbatch), device)

    def _data_factory(self) -> object | None:
        if self.data is not None:
            return load_object(self.data)
        if self.reference is None or is_huggingface(self.reference):
            return None
        try:
            return load_object(f"{self.reference.rpartition(':')[0]}:data")
        except InvalidArgument:
            return None


def _made(reference: str, factory: Callable[..., object], told: Mapping[str, int]) -> object:
    try:
        return factory(**told)
    except (torch.OutOfMemoryError, StagewrightError):
        raise
    except Exception as error:
        raise InvalidArgument(
            f"{reference!r} failed to build the model: {type(error).__name__}: {error}",
            field="model",
            hint="it is called without arguments, but for num_layers and tensor_degree where it takes them",
        ) from error


def _told(factory: Callable[..., object], num_layers: int | None, tensor_degree: int) -> dict[str, int]:
    """Return the arguments for a factory: the sizes that are asked for and that it takes."""
    known = inspect.signature(factory).parameters
    told = {}
    if num_layers is not None:
        if "num_layers" not in known:
            raise InvalidArgument(
                f"the model is to be shortened to {num_layers} layers, its factory takes no num_layers",
                field="model",
                hint="let the factory take num_layers, or measure on a device that holds the whole model",
            )
        told["num_layers"] = num_layers
    if tensor_degree > 1 and "tensor_degree" in known:
        told["tensor_degree"] = tensor_degree
    return told


def _refuse_changes(num_layers: int | None, tensor_degree: int) -> None:
    if num_layers is not None or tensor_degree > 1:
        raise InvalidArgument(
            "a module at hand is measured as it is, neither shortened nor cut",
            field="model",
            hint="name the model as module:factory",
        )


def first_batch(factory: object, microbatch: int, sequence_length: int) -> Batch:
    """Return the first batch of a data factory, which may take `batch_size` and `sequence_length`."""
    if not callable(factory):
        raise InvalidArgument(f"the data factory is {type(factory).__name__}, not a function", field="data")
    known = {"batch_size": microbatch, "sequence_length": sequence_length}
    parameters = inspect.signature(factory).parameters
    made: Any = factory(**{name: value for name, value in known.items() if name in parameters})
    if isinstance(made, (Mapping, tuple, Tensor)):
        return made
    iterator: Iterator[Batch] = iter(made)
    try:
        return next(iterator)
    except StopIteration:
        raise InvalidArgument("the data factory yields no batch", field="data") from None
