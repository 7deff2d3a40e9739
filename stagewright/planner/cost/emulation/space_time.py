"""A space-time transformer block on emulated devices: dynamic sequence parallelism against Ulysses.

x is [frames, patches, features]. The spatial attention mixes the patches of each frame, the temporal one the frames of
each patch. Split by frames the first is local, split by patches the second, so one all-to-all of x switches between them
and a second one switches back (DSP, Zhao et al. 2024). The block here is x + attend(x w) along one dimension, twice; its
gradient is checked through the same switches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stagewright.planner.cost.emulation.wire import Array, Wire

FRAMES, PATCHES = 0, 1


@dataclass(frozen=True)
class SpaceTimeResult:
    """Output of the block, gradients of both weights, and what each device received."""

    output: Array
    spatial_gradient: Array
    temporal_gradient: Array
    wire: Wire


def reference_block(x: Array, spatial: Array, temporal: Array, output_gradient: Array) -> SpaceTimeResult:
    """Return output and gradients on one device."""
    middle = _attend(x, spatial, along=PATCHES)
    output = _attend(middle, temporal, along=FRAMES)
    d_middle, d_temporal = _attend_backward(middle, temporal, output_gradient, along=FRAMES)
    _, d_spatial = _attend_backward(x, spatial, d_middle, along=PATCHES)
    return SpaceTimeResult(output, d_spatial, d_temporal, Wire(1))


def switched_block(x: Array, spatial: Array, temporal: Array, output_gradient: Array, degree: int) -> SpaceTimeResult:
    """Return the same on `degree` devices with one switch of the split dimension before each attention but the first."""
    wire = Wire(degree)
    local = list(np.split(x, degree, axis=FRAMES))
    middle = [_attend(part, spatial, along=PATCHES) for part in local]
    by_patch = switch(middle, PATCHES, wire)
    output = [_attend(part, temporal, along=FRAMES) for part in by_patch]
    # Back to frames, so that the next block finds what this one found.
    final = switch(output, FRAMES, wire)
    gradient = switch(list(np.split(output_gradient, degree, axis=FRAMES)), PATCHES, wire)
    backward = [
        _attend_backward(part, temporal, grad, along=FRAMES) for part, grad in zip(by_patch, gradient, strict=True)
    ]
    by_frame = switch([d for d, _ in backward], FRAMES, wire)
    spatial_parts = [
        _attend_backward(part, spatial, grad, along=PATCHES)[1] for part, grad in zip(local, by_frame, strict=True)
    ]
    return SpaceTimeResult(
        np.concatenate(final, axis=FRAMES),
        sum(spatial_parts, np.zeros_like(spatial)),
        sum((w for _, w in backward), np.zeros_like(temporal)),
        wire,
    )


def switch(parts: list[Array], to: int, wire: Wire) -> list[Array]:
    """Return the tensor split along the other of its first two dimensions: one all-to-all."""
    degree = len(parts)
    other = FRAMES if to == PATCHES else PATCHES
    pieces = [np.split(part, degree, axis=to) for part in parts]
    return [
        np.concatenate([wire.send(pieces[source][target], source, target) for source in range(degree)], axis=other)
        for target in range(degree)
    ]


def _attend(x: Array, weight: Array, *, along: int) -> Array:
    """Return x + softmax(y y') y with y = x w, over the positions of one dimension."""
    moved = x if along == PATCHES else x.swapaxes(0, 1)
    y = moved @ weight
    probabilities = _softmax(y @ y.swapaxes(1, 2))
    result = moved + probabilities @ y
    return result if along == PATCHES else result.swapaxes(0, 1)


def _attend_backward(x: Array, weight: Array, gradient: Array, *, along: int) -> tuple[Array, Array]:
    """Return the gradients of x and of the weight."""
    moved, grad = (x, gradient) if along == PATCHES else (x.swapaxes(0, 1), gradient.swapaxes(0, 1))
    y = moved @ weight
    probabilities = _softmax(y @ y.swapaxes(1, 2))
    dy = probabilities.swapaxes(1, 2) @ grad
    dp = grad @ y.swapaxes(1, 2)
    ds = probabilities * (dp - (dp * probabilities).sum(axis=2, keepdims=True))
    dy = dy + ds @ y + ds.swapaxes(1, 2) @ y
    dx = grad + dy @ weight.T
    dw = np.einsum("fpi,fpj->ij", moved, dy)
    return (dx if along == PATCHES else dx.swapaxes(0, 1)), dw


def _softmax(scores: Array) -> Array:
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
