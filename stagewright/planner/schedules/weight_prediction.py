"""Predicting weights some updates ahead, from the optimizer's own direction (SpecTrain, XPipe, PipeMare, XGrad).

One interface for all optimizers: `predicted(weights, direction, steps, learning_rate)` moves the weights s times the
last direction, with

    SGD with momentum   v               Adam    m_hat / (sqrt(v_hat) + eps)
    AdamW               Adam + lambda w RMSprop g / (sqrt(v) + eps)

For a constant gradient in steady state the prediction with momentum is exact.

Papers: Chen et al. 2018 (SpecTrain); Guan et al. 2019 (XPipe), 2023 (XGrad); Yang et al., MLSys 2021 (PipeMare).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def predicted(weights: Floats, direction: Floats, steps: int, learning_rate: float) -> Floats:
    """Return w - s eta direction."""
    return weights - steps * learning_rate * direction


def momentum_direction(velocity: Floats) -> Floats:
    """Return the direction of SGD with momentum, its velocity."""
    return velocity


def adam_direction(
    first: Floats, second: Floats, step: int, *, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> Floats:
    """Return Adam's direction from its moments after `step` updates (from 1)."""
    return (first / (1 - beta1**step)) / (np.sqrt(second / (1 - beta2**step)) + epsilon)


def adamw_direction(
    weights: Floats,
    first: Floats,
    second: Floats,
    step: int,
    *,
    weight_decay: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> Floats:
    """Return AdamW's direction: Adam's and the decoupled decay."""
    return adam_direction(first, second, step, beta1=beta1, beta2=beta2, epsilon=epsilon) + weight_decay * weights


def rmsprop_direction(gradient: Floats, second: Floats, *, epsilon: float = 1e-8) -> Floats:
    """Return RMSprop's direction."""
    return gradient / (np.sqrt(second) + epsilon)


def discrepancy_corrected(
    weights: Floats, average_change: Floats, forward_delay: float, backward_delay: float = 0.0
) -> Floats:
    """Return PipeMare's u = w - (tau_fwd - tau_bkwd) delta, delta the average of w(t + 1) - w(t) with its sign."""
    return weights - (forward_delay - backward_delay) * average_change
