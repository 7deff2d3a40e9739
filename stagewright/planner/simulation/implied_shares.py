"""The shares that a schedule's own parameters imply: AutoPipe's halved units, PipeFisher's work items."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.simulation.network import Shares


def implied_shares(schedule: Schedule) -> Shares:
    """Return the shares of a schedule nobody was told shares for.

    `parameters["halved"]` = n: the first 2 n units are half a microbatch. `parameters["fill_s"]` and `["items"]`: that
    many work items of that many seconds.
    """
    halved, items = int(schedule.parameters.get("halved", 0)), int(schedule.parameters.get("items", 0))
    units = unit_factors(schedule.num_microbatches, halved) if halved else None
    fill_s = np.full(items, float(schedule.parameters["fill_s"])) if items else None
    return Shares(microbatch_time=units, microbatch_activation=units, fill_s=fill_s)


def unit_factors(num_units: int, num_halved: int) -> npt.NDArray[np.float64]:
    """Return each unit's share of a microbatch, shape [num_units]: 1/2 for the first 2 n."""
    return np.where(np.arange(num_units) < 2 * num_halved, 0.5, 1.0)
