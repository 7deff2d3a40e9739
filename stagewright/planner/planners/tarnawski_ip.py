"""The integer programme of Tarnawski et al. for partitions into any sets, modelled in PuLP; see `tarnawski_dp`."""

from __future__ import annotations

import numpy as np
import pulp

from stagewright.planner.planners.tarnawski_dp import DevicePartition, DeviceProblem, accelerator_load_s


def solve_any_sets(problem: DeviceProblem, start: DevicePartition, *, time_limit_s: float) -> DevicePartition:
    """Return the best partition into any sets with its proven bound, never worse than `start`."""
    model = pulp.LpProblem("any_sets", pulp.LpMinimize)
    groups, accelerators = range(len(problem.size_bytes)), range(problem.num_accelerators)
    devices = range(problem.num_accelerators + problem.num_cpus)
    tails = range(len(problem.tail_group))
    x = {(v, i): pulp.LpVariable(f"x_{v}_{i}", cat="Binary") for v in groups for i in devices}
    cut = {(u, i): pulp.LpVariable(f"cut_{u}_{i}", 0, 1) for u in tails for i in accelerators}
    load = pulp.LpVariable("load", 0, start.max_load_s * (1 + 1e-9))
    model += load
    for v in groups:
        model += pulp.lpSum(x[v, i] for i in devices) == 1
    for u in tails:
        tail = int(problem.tail_group[u])
        heads = set(problem.head_group[problem.head_start[u] : problem.head_start[u + 1]].tolist()) - {tail}
        for i in accelerators:
            for head in sorted(heads):
                model += cut[u, i] >= x[head, i] - x[tail, i]
                model += cut[u, i] >= x[tail, i] - x[head, i]
    for i in accelerators:
        work = pulp.lpSum(
            float(problem.accelerator_s[v]) * x[v, i] for v in groups if np.isfinite(problem.accelerator_s[v])
        )
        sent = pulp.lpSum(float(problem.tail_cost_s[u]) * cut[u, i] for u in tails)
        model += work + sent <= load
        if np.isfinite(problem.memory_bytes):
            scale = max(float(problem.size_bytes.max()), 1.0)
            held = pulp.lpSum(float(problem.size_bytes[v]) / scale * x[v, i] for v in groups)
            model += held <= problem.memory_bytes / scale
        for v in groups:
            if not np.isfinite(problem.accelerator_s[v]):
                model += x[v, i] == 0
    for i in devices[problem.num_accelerators :]:
        model += pulp.lpSum(float(problem.cpu_s[v]) * x[v, i] for v in groups) <= load
    for i in accelerators[1:]:
        for v in groups:
            model += x[v, i] <= pulp.lpSum(x[w, i - 1] for w in range(v))
    solver = pulp.HiGHS(msg=False, timeLimit=time_limit_s, gapRel=0.0, gapAbs=0.0)
    model.solve(solver)
    info = model.solverModel.getInfo()
    bound = min(max(float(info.mip_dual_bound), 0.0), start.max_load_s)
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return DevicePartition(start.max_load_s, bound, start.devices)
    chosen = [[v for v in groups if (x[v, i].value() or 0.0) > 0.5] for i in devices]
    value = _max_load_s(problem, chosen)
    if value >= start.max_load_s:
        return DevicePartition(start.max_load_s, bound, start.devices)
    kinds = ["accelerator" if i < problem.num_accelerators else "cpu" for i in devices]
    used = tuple((kind, tuple(members)) for kind, members in zip(kinds, chosen, strict=True) if members)
    return DevicePartition(value, bound, used)


def _max_load_s(problem: DeviceProblem, chosen: list[list[int]]) -> float:
    """Return the largest load, recomputed from the sets alone."""
    loads = []
    for device, members in enumerate(chosen):
        if device < problem.num_accelerators:
            inside = np.zeros(len(problem.size_bytes), dtype=np.bool_)
            inside[members] = True
            loads.append(accelerator_load_s(problem, inside))
        else:
            loads.append(float(problem.cpu_s[members].sum()))
    return max(loads)
