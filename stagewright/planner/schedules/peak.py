"""The most activations each rank holds: a sum over the order, independent of times."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import KIND, SLICE, STAGE, Orders, Schedule

Floats = npt.NDArray[np.float64]


def peak_activations(schedule: Schedule, costs: StageCosts | None = None) -> Floats:
    """Return the most live activations of each rank, freed at the end of W or B, shape [num_ranks].

    Without costs a microbatch on one rank counts 1, which its chunks and slices divide.
    """
    activation = _equal_shares(schedule) if costs is None else costs.activation
    return np.array([_peak(order, activation, schedule.num_slices) for order in schedule.orders])


def _peak(order: Orders, activation: Floats, num_slices: int) -> float:
    sign = np.zeros(len(Kind))
    sign[Kind.F], sign[Kind.B], sign[Kind.W] = 1.0, -1.0, -1.0
    share = np.where(order[:, SLICE] < 0, 1.0, 1.0 / num_slices)
    return float(np.cumsum(sign[order[:, KIND]] * activation[order[:, STAGE]] * share).max(initial=0.0))


def _equal_shares(schedule: Schedule) -> Floats:
    chunks = schedule.num_chunks / schedule.num_replicas
    return np.full(schedule.num_stages, 1.0 / max(chunks, 1.0))
