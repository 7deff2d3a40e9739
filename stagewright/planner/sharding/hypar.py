"""HyPar (Song et al., HPCA 2019): data or model parallelism for each layer, two ways at a time, by communication alone.

At each of log2 N levels the devices are halved, and a chain of layers chooses between

    dp    input, output and their gradients split by batch; the weight gradient is summed: 2(n-1)/n |W| with n = 2
    mp    weights and input split by input features; the output is summed: 2(n-1)/n |output|

plus what changes hands between layers, derived from the layouts by `redistribution` (the paper's table: dp-dp 0, dp-mp
|F|/4 + |E|/4, mp-mp |E|/2, mp-dp |E|/2 elements, F the tensor between, E its gradient). The least total of a level is a
shortest path,

    C(l, p) = intra(l, p) + min_q [ C(l-1, q) + inter(q -> p) ],

and the next level works on what a device of this level holds. Exact for each level; the recursion over levels is greedy,
and neither compute time nor memory is seen. One weird trick (Krizhevsky, 2014), convolutions data parallel and fully
connected layers model parallel, is what it answers on AlexNet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.sharding.layout import PARTIAL, REPLICATED, Mesh, Placement, split
from stagewright.planner.sharding.redistribution import redistribute

Parallelism = Literal["dp", "mp"]
_CHOICES: tuple[Parallelism, ...] = ("dp", "mp")


@dataclass(frozen=True)
class ChainLayer:
    """One layer by its elements: weights, and input and output of a whole batch."""

    name: str
    weight_elements: float
    input_elements: float
    output_elements: float


@dataclass(frozen=True)
class HyparAnswer:
    """Choices by level, outermost first, and the elements a device sends in a step over all levels."""

    levels: tuple[tuple[Parallelism, ...], ...]
    sent_elements: float


def hypar(layers: Sequence[ChainLayer], num_devices: int) -> HyparAnswer:
    """Return the choice of each layer at each level.

    Raises
    ------
    InvalidArgument : when the devices are no power of two.
    """
    num_levels = round(math.log2(max(num_devices, 1)))
    if 2**num_levels != num_devices:
        raise InvalidArgument(
            f"{num_devices} devices cannot be halved again and again", field="num_devices", hint="give a power of two"
        )
    levels = []
    total = 0.0
    held = list(layers)
    for _ in range(num_levels):
        choices, elements = one_level(held)
        levels.append(choices)
        total += elements
        held = [halved(layer, choice) for layer, choice in zip(held, choices, strict=True)]
    return HyparAnswer(tuple(levels), total)


def one_level(layers: Sequence[ChainLayer]) -> tuple[tuple[Parallelism, ...], float]:
    """Return the best choices of a chain between two halves, and the elements each sends; ties go to data parallelism."""
    best: dict[Parallelism, tuple[float, tuple[Parallelism, ...]]] = {
        choice: (intra_elements(layers[0], choice), (choice,)) for choice in _CHOICES
    }
    for before, layer in itertools.pairwise(layers):
        best = {
            choice: min(
                (
                    best[last][0] + inter_elements(before, last, choice) + intra_elements(layer, choice),
                    (*best[last][1], choice),
                )
                for last in _CHOICES
            )
            for choice in _CHOICES
        }
    elements, choices = min(best.values())
    return choices, elements


def intra_elements(layer: ChainLayer, choice: Parallelism) -> float:
    """Return the elements sent for a layer's own sum: its weight gradient, or its output."""
    summed = layer.weight_elements if choice == "dp" else layer.output_elements
    return summed * _share(PARTIAL, REPLICATED)


def inter_elements(before: ChainLayer, last: Parallelism, choice: Parallelism) -> float:
    """Return the elements sent for the tensor between two layers, and for its gradient on the way back."""
    written = split("batch") if last == "dp" else REPLICATED
    needed = split("batch") if choice == "dp" else split("features")
    gradient_needed = split("batch") if last == "dp" else REPLICATED
    return before.output_elements * (_share(written, needed) + _share(needed, gradient_needed))


@cache
def _share(before: Placement, after: Placement) -> float:
    """Return the share of a tensor that each of two devices sends to change its placement."""
    steps = redistribute(
        Mesh(("half",), (2,)),
        (before,),
        (after,),
        dims=("batch", "features"),
        sizes={"batch": 2, "features": 2},
        size_bytes=1.0,
    )
    return sum(step.sent_bytes for step in steps)


def halved(layer: ChainLayer, choice: Parallelism) -> ChainLayer:
    """Return what one half holds of a layer."""
    if choice == "dp":
        return ChainLayer(layer.name, layer.weight_elements, layer.input_elements / 2, layer.output_elements / 2)
    return ChainLayer(layer.name, layer.weight_elements / 2, layer.input_elements / 2, layer.output_elements)
