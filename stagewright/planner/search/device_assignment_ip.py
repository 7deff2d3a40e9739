"""The integer programme of `device_assignment`, modelled in PuLP.

    min z   s.t.  sum_k w[l, k] = 1                                      every layer on one device
                  s[l, k] >= w[l, k] - w[l - 1, k],  sum_l s[l, k] <= 1   one run of layers a device (contiguity)
                  sum_l m[l] w[l, k] <= M_k                              memory
                  z >= sum_l t[k, l] w[l, k]                             load
                  z >= b[l] c[k, q] (w[l, k] + w[l + 1, q] - 1)          link, for k != q

w binary, s in [0, 1]. HiGHS, or CBC where HiGHS is missing, under a time limit; the answer carries the solver's proven
bound, and its bottleneck is recomputed from the stages alone.
"""

from __future__ import annotations

import time
from itertools import pairwise

import pulp

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.search.device_assignment import Assignment, AssignmentProblem, bottleneck_s


def assign_by_programme(problem: AssignmentProblem, *, time_limit_s: float = 60.0) -> Assignment | None:
    """Return the best assignment found with its proven bound; None when there is none.

    Raises InvalidArgument when the limit passed without a solution.
    """
    layers, devices = range(problem.num_layers), range(problem.num_devices)
    scale = 1.0 / max(float(problem.time_s.max()), 1e-300)
    held = 1.0 / max(float(problem.layer_bytes.max()), 1e-300)
    model = pulp.LpProblem("device_assignment", pulp.LpMinimize)
    w = {(layer, k): pulp.LpVariable(f"w_{layer}_{k}", cat="Binary") for layer in layers for k in devices}
    s = {(layer, k): pulp.LpVariable(f"s_{layer}_{k}", 0, 1) for layer in layers for k in devices}
    z = pulp.LpVariable("z", 0)
    model += z
    for layer in layers:
        model += pulp.lpSum(w[layer, k] for k in devices) == 1
    for k in devices:
        for layer in layers:
            model += s[layer, k] >= (w[layer, k] - w[layer - 1, k] if layer else w[layer, k])
        model += pulp.lpSum(s[layer, k] for layer in layers) <= 1
        model += (
            pulp.lpSum(float(problem.layer_bytes[layer]) * held * w[layer, k] for layer in layers)
            <= float(problem.memory_bytes[k]) * held
        )
        model += z >= pulp.lpSum(float(problem.time_s[k, layer]) * scale * w[layer, k] for layer in layers)
        for q in devices:
            for layer in layers[:-1]:
                cost = float(problem.boundary_bytes[layer] * problem.link_s_per_byte[k, q]) * scale
                if k != q and cost > 0:
                    model += z >= cost * (w[layer, k] + w[layer + 1, q] - 1)
    bound = _solve(model, time_limit_s)
    if model.sol_status == pulp.LpSolutionInfeasible:
        return None
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise InvalidArgument(
            f"the integer programme has no solution after {time_limit_s:g} s (status {pulp.LpStatus[model.status]})",
            field="time_limit_s",
            hint="give more time, or take the dynamic programme",
        )
    of_layer = [max(devices, key=lambda k, at=layer: w[at, k].value() or 0.0) for layer in layers]  # type: ignore[misc]
    cuts = [0, *(layer for layer in layers[1:] if of_layer[layer] != of_layer[layer - 1]), problem.num_layers]
    stages = tuple((of_layer[first], first, end) for first, end in pairwise(cuts))
    value = bottleneck_s(problem, stages)
    if bound is None:
        bound = value * scale if model.sol_status == pulp.LpSolutionOptimal else 0.0
    return Assignment(value, min(bound / scale, value), stages)


def _solve(model: pulp.LpProblem, time_limit_s: float) -> float | None:
    """Solve with HiGHS, else with CBC; return the proven bound where the solver tells it."""
    solver = pulp.HiGHS(msg=False, timeLimit=time_limit_s, gapRel=0.0, gapAbs=0.0)
    if not solver.available():
        started = time.monotonic()
        model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit_s, gapRel=0.0))
        if time.monotonic() - started >= time_limit_s and model.sol_status == pulp.LpSolutionOptimal:
            model.sol_status = pulp.LpSolutionIntegerFeasible
        return None
    model.solve(solver)
    return float(model.solverModel.getInfo().mip_dual_bound)
