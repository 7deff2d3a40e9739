"""One layer of a model, as profiles name it and stages are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["embedding", "block", "norm", "head", "loss", "convolution", "pooling", "other"]


@dataclass(frozen=True)
class Layer:
    """A layer: the least that a stage can hold.

    Parameters
    ----------
    name : stable and unique; the path of the module in the tree where the layer is one module.
    kind : its role.
    layer_class : equal for layers of equal structure and shapes; such layers cost the same.
    modules : paths of the modules the layer consists of, empty for the loss.
    parameters : names of its parameters in the model, first occurrence of tied ones included.
    num_parameters : trainable elements of these, a parameter used twice in the layer counted once.
    """

    name: str
    kind: Kind
    layer_class: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    num_parameters: int


@dataclass(frozen=True)
class Tie:
    """One parameter that several layers share.

    Parameters
    ----------
    parameter : its name where it occurs first.
    names : all its names, one for each occurrence.
    layers : the layers that hold it, in model order.
    num_parameters : its elements.
    """

    parameter: str
    names: tuple[str, ...]
    layers: tuple[str, ...]
    num_parameters: int
