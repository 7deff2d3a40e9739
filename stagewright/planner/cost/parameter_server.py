"""Training with parameter servers: time of an iteration, barriers and bounded staleness.

A worker pushes its gradients and pulls the weights, 2 Psi bytes an iteration (Li et al., OSDI 2014; GeePS, Cui et al. 2016).
Under a barrier every iteration ends with the slowest worker; with staleness s a worker may be s iterations ahead of the
slowest (Ho et al. 2013), so passing hiccups of different workers do not add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument

Floats = npt.NDArray[np.float64]


def iteration_ends(compute_s: Floats, exchange_s: float, *, staleness: int | None = 0) -> Floats:
    """Return the end of every iteration of every worker, [iterations, workers].

    Parameters
    ----------
    compute_s : seconds of each iteration on each worker, [iterations, workers].
    exchange_s : push and pull of one worker.
    staleness : how far a worker may be ahead of the slowest: 0 is a barrier, None no limit (asynchronous).
    """
    if staleness is not None and staleness < 0:
        raise InvalidArgument(f"staleness is {staleness}, it must be at least 0", field="staleness")
    iterations, workers = compute_s.shape
    ends = np.zeros((iterations, workers))
    for index in range(iterations):
        before = ends[index - 1] if index else np.zeros(workers)
        start = before
        if staleness is not None and index > staleness:
            # Iteration i may start once all workers have finished iteration i - 1 - s.
            start = np.maximum(before, ends[index - 1 - staleness].max())
        ends[index] = start + compute_s[index] + exchange_s
    return ends


def mean_iteration_s(compute_s: Floats, exchange_s: float, *, staleness: int | None = 0) -> float:
    """Return the seconds of one iteration in the mean until the last worker is done."""
    ends = iteration_ends(compute_s, exchange_s, staleness=staleness)
    last_s = float(np.max(ends[-1]))
    return last_s / len(compute_s)


def wave_staleness(local: int, clock_distance: int) -> int:
    """Return HetPipe's global staleness (D+1)(s+1) + s - 1 of workers that run waves of s+1 minibatches."""
    return (clock_distance + 1) * (local + 1) + local - 1


def traffic_bytes(parameter_bytes: float) -> float:
    """Return what one worker moves in an iteration: gradients up, weights down."""
    return 2 * parameter_bytes


def learning_rate(base: float, *, base_batch: int, batch: int, rule: str = "linear") -> float:
    """Return the rate for another global batch: in proportion (Goyal et al. 2017), or to its root for Adam."""
    factors = {"linear": batch / base_batch, "root": sqrt(batch / base_batch), "none": 1.0}
    if rule not in factors:
        raise InvalidArgument(f"there is no rule {rule!r}", field="rule", hint=f"known: {', '.join(factors)}")
    return base * factors[rule]


def warmed_up(rate: float, step: int, warmup_steps: int) -> float:
    """Return the rate at a step of a linear warm-up."""
    return rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps else rate


def trust_ratios(
    weight_norms: Sequence[float], gradient_norms: Sequence[float], *, weight_decay: float = 0.0, trust: float = 0.001
) -> list[float]:
    """Return LARS' layer-wise ratios trust |w| / (|g| + decay |w|), 1 where a norm is zero (You et al. 2017)."""
    return [
        trust * w / (g + weight_decay * w) if w > 0 and g > 0 else 1.0
        for w, g in zip(weight_norms, gradient_norms, strict=True)
    ]
