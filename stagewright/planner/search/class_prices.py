"""What layers of each class cost and need under a configuration, and what a device leaves them, as bounds see it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.pricing import LayerClasses, Priced

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


class ClassPrices(NamedTuple):
    """Costs of one layer of each class, [C], or [3, C] with the recomputation level first; names as in `Priced`.

    Where it holds many configurations, they come first.

    Parameters
    ----------
    run_class, run_length : class and length of each run of equal layers, [K].
    latency_s : once a step and stage, of each configuration.
    overhead_s : of every action.
    levels : allowed levels, bool [3].
    capacity_bytes : of a device, for what depends on the plan.
    """

    run_class: Ints
    run_length: Ints
    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    recompute_s: Floats
    kept_bytes: Floats
    late_bytes: Floats
    workspace_bytes: Floats
    state_bytes: Floats
    step_s: Floats
    latency_s: Floats
    overhead_s: float
    levels: npt.NDArray[np.bool_]
    capacity_bytes: float


def class_prices(
    priced: Priced,
    classes: LayerClasses,
    *,
    defers: bool,
    overhead_s: float,
    levels: npt.NDArray[np.bool_],
    capacity_bytes: float,
) -> ClassPrices:
    """Return the prices of all configurations; `defers` where every backward is split."""
    return ClassPrices(
        run_class=classes.run_class,
        run_length=classes.run_length,
        forward_s=priced.forward_s,
        input_grad_s=priced.input_grad_s,
        weight_grad_s=priced.weight_grad_s,
        recompute_s=priced.recompute_s,
        kept_bytes=priced.kept_bytes,
        late_bytes=priced.late_bytes,
        workspace_bytes=priced.workspace_of(defers=defers),
        state_bytes=priced.state_bytes,
        step_s=priced.step_s,
        latency_s=priced.latency_s,
        overhead_s=overhead_s,
        levels=levels,
        capacity_bytes=capacity_bytes,
    )


@njit(cache=True)
def prices_of(table: ClassPrices, row: int) -> ClassPrices:
    """Return the prices of one configuration."""
    return ClassPrices(
        table.run_class,
        table.run_length,
        table.forward_s[row],
        table.input_grad_s[row],
        table.weight_grad_s[row],
        table.recompute_s[row],
        table.kept_bytes[row],
        table.late_bytes[row],
        table.workspace_bytes[row],
        table.state_bytes[row],
        table.step_s[row],
        table.latency_s[row : row + 1],
        table.overhead_s,
        table.levels,
        table.capacity_bytes,
    )
