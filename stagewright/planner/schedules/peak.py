"""The most activations each rank holds: a sum over the order, independent of times.

What a rank accepts from its peer (BPipe) comes and goes by the peer's clock, so it is counted as if the most of it lay there
all the time: rank d's peer is rank D - 1 - d.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import COMPUTE_KINDS, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import KIND, SLICE, STAGE, Orders, Schedule

Floats = npt.NDArray[np.float64]


def peak_activations(schedule: Schedule, costs: StageCosts | None = None) -> Floats:
    """Return the most live activations of each rank, freed at the end of W or B or when moved away, shape [num_ranks].

    Without costs a microbatch on one rank counts 1, which its chunks and slices divide.
    """
    activation = _equal_shares(schedule) if costs is None else costs.activation
    own = np.array([_peak(order, activation, schedule.num_slices) for order in schedule.orders])
    lent = np.array([_most_lent(order, activation, schedule.num_slices) for order in schedule.orders])
    peaks: Floats = own + lent[::-1]
    return peaks


def _most_lent(order: Orders, activation: Floats, num_slices: int) -> float:
    """Return the most that the rank's peer keeps for it at a time."""
    kind = order[:, KIND]
    sign = np.where(kind == Kind.EVICT, 1.0, np.where(kind == Kind.LOAD, -1.0, 0.0))
    return float(np.cumsum(sign * _sizes(order, activation, num_slices)).max(initial=0.0))


def _sizes(order: Orders, activation: Floats, num_slices: int) -> Floats:
    sizes: Floats = activation[order[:, STAGE]] * np.where(order[:, SLICE] < 0, 1.0, 1.0 / num_slices)
    return sizes


def _peak(order: Orders, activation: Floats, num_slices: int) -> float:
    sign = np.zeros(len(Kind))
    sign[Kind.F], sign[Kind.B], sign[Kind.W] = 1.0, -1.0, -1.0
    size = _sizes(order, activation, num_slices)
    change = sign[order[:, KIND]] * size
    away, back = (
        np.flatnonzero(np.isin(order[:, KIND], kinds))
        for kinds in ((Kind.OFFLOAD, Kind.EVICT), (Kind.RELOAD, Kind.LOAD))
    )
    if not len(away):
        return float(np.cumsum(change).max(initial=0.0))
    # A move runs beside compute: it has left behind the action after its row, and is back from the action before it on.
    is_compute = np.isin(order[:, KIND], [int(kind) for kind in COMPUTE_KINDS])
    compute = np.cumsum(is_compute)
    by_action = np.bincount(compute, weights=change, minlength=len(order) + 3)
    freed_behind = np.where(np.isin(order[:, KIND], (Kind.B, Kind.W)), -change, 0.0)
    np.add.at(by_action, compute[away] + 2, -size[away])
    np.add.at(by_action, compute[back], size[back])
    return float((np.cumsum(by_action) + np.bincount(compute, weights=freed_behind, minlength=len(order) + 3)).max())


def _equal_shares(schedule: Schedule) -> Floats:
    chunks = schedule.num_chunks / schedule.num_replicas
    return np.full(schedule.num_stages, 1.0 / max(chunks, 1.0))
