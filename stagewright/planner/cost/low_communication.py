"""Data parallelism that talks rarely: DiLoCo and streaming DiLoCo, traffic and the outer step.

Each of n replicas takes H local steps from the shared weights x, ending at x_i; the outer gradient is d = x - mean_i x_i, and

    v <- mu v + d,    x <- x - lr (d + mu v)        Nesterov momentum on d

Per local step a replica sends 2 (n-1)/n Psi g / H bytes, where synchronous training sends 2 (n-1)/n Psi g. Streaming sends the
model as P fragments, one every H / P steps: the same mean, and 1/P of the peak. The result is not that of synchronous training, except with
H = 1, mu = 0, lr = 1 and plain SGD, where averaging weights is averaging gradients.

Papers: Douillard et al., DiLoCo, 2023; Douillard et al., Streaming DiLoCo with overlapping communication, 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.communication import sent_bytes
from stagewright.planner.errors import InvalidArgument

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RareTraffic:
    """Bytes that one replica's device sends: mean of a local step, and at the step that sends most."""

    mean_bytes: float
    peak_bytes: float


def diloco_traffic(
    num_parameters: float, num_replicas: int, *, local_steps: int, fragments: int = 1, bytes_per_element: float = 4.0
) -> RareTraffic:
    """Return the traffic of outer steps every `local_steps`; InvalidArgument unless the fragments divide them."""
    if local_steps < 1 or fragments < 1 or local_steps % fragments:
        raise InvalidArgument(
            f"{fragments} fragments do not divide {local_steps} local steps",
            field="fragments",
            hint="each fragment is sent at a step of its own, evenly spaced",
        )
    whole = sent_bytes("all-reduce", num_parameters * bytes_per_element, num_replicas)
    return RareTraffic(whole / local_steps, whole / fragments)


def outer_step(
    shared: Floats, replicas: Floats, velocity: Floats, *, learning_rate: float, momentum: float
) -> tuple[Floats, Floats]:
    """Return new shared weights and velocity; `replicas` is [n, ...] over the shape of `shared`."""
    delta = shared - replicas.mean(axis=0)
    velocity = momentum * velocity + delta
    return shared - learning_rate * (delta + momentum * velocity), velocity
