"""The integer programmes of Tarnawski et al. (NeurIPS 2020), modelled in PuLP and solved by HiGHS; see `tarnawski_dp`.

`solve_any_sets` partitions into any sets. `contiguous_load` is the contiguous programme on a chain of L layers whose
stage costs add up, with devices in pipeline order:

    min M  s.t.  sum_i x[v, i] = 1,    sum_{j <= i} x[u, j] >= sum_{j <= i} x[v, j]  for edges (u, v),
                 out[u, i] >= x[u, i] - x[u + 1, i],   in[u, i] >= x[u + 1, i] - x[u, i],
                 sum_v p[v] x[v, i] + sum_u c[u] (in[u, i] + out[u, i]) <= M,     sum_v m[v] x[v, i] <= memory

The second row is the paper's contiguity (z) and, beyond it, keeps the devices a pipeline: nobody sends backwards. On the
common Problem it answers what `tarnawski-dp` answers, by another method; the largest of many configurations are cut off
by the best load so far. O(2^(L D)) in the worst case; HiGHS proves the optimum or the deadline leaves the incumbent.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pulp

from stagewright.planner.planners.range_cuts import Cut
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.planners.table_planner import table_planner
from stagewright.planner.planners.tarnawski_dp import PAPER, DevicePartition, DeviceProblem, accelerator_load_s
from stagewright.planner.search.problem import Partition

Floats = npt.NDArray[np.float64]


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


def contiguous_load(
    layer_s: Floats,
    cut_s: Floats,
    layer_bytes: Floats,
    num_devices: int,
    *,
    memory_bytes: float = float("inf"),
    time_limit_s: float = 60.0,
) -> Cut | None:
    """Return the chain's partition into stages of at least one layer with the least load; None when none fits.

    Parameters
    ----------
    layer_s, layer_bytes : [L].
    cut_s : [L + 1], seconds that a cut before each layer adds to both of its stages.
    """
    layers, devices, cuts = range(len(layer_s)), range(num_devices), range(1, len(layer_s))
    scale = 1.0 / float(layer_s.sum())
    model = pulp.LpProblem("contiguous", pulp.LpMinimize)
    x = {(v, i): pulp.LpVariable(f"x_{v}_{i}", cat="Binary") for v in layers for i in devices}
    sent = {(u, i): pulp.LpVariable(f"sent_{u}_{i}", 0) for u in cuts for i in devices}
    load = pulp.LpVariable("load", 0)
    model += load
    for v in layers:
        model += pulp.lpSum(x[v, i] for i in devices) == 1
    for u in cuts:
        for i in devices:
            model += pulp.lpSum(x[u - 1, j] - x[u, j] for j in range(i + 1)) >= 0
            model += sent[u, i] >= x[u, i] - x[u - 1, i]
            model += sent[u, i] >= x[u - 1, i] - x[u, i]
    for i in devices:
        work = pulp.lpSum(scale * float(layer_s[v]) * x[v, i] for v in layers)
        model += work + pulp.lpSum(scale * float(cut_s[u]) * sent[u, i] for u in cuts) <= load
        model += pulp.lpSum(x[v, i] for v in layers) >= 1
        if np.isfinite(memory_bytes):
            model += pulp.lpSum(float(layer_bytes[v]) / memory_bytes * x[v, i] for v in layers) <= 1
    model.solve(pulp.HiGHS(msg=False, timeLimit=time_limit_s, gapRel=0.0, gapAbs=1e-9))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    device = [max(devices, key=lambda i, v=v: x[v, i].value() or 0.0) for v in layers]  # type: ignore[misc]
    bounds = (0, *(v for v in cuts if device[v] != device[v - 1]), len(layer_s))
    loads = [
        float(layer_s[a:b].sum()) + float(cut_s[a] * (a > 0) + cut_s[b] * (b < len(layer_s)))
        for a, b in pairwise(bounds)
    ]
    return Cut(max(loads), bounds)


def _solve_one(table: StageTable) -> Iterator[tuple[float, Partition]]:
    costs, count, level = table.costs, table.num_microbatches, table.levels[0]
    layer_bytes = costs.static_bytes + costs.kept_bytes[level]
    room = table.room_bytes - float(costs.workspace_bytes[level].max())
    if room <= 0 or layer_bytes.sum() > room * table.num_ranks:
        return
    layer_s = count * costs.time_s
    cut_s = 2.0 * count * table.hop_s
    found = contiguous_load(layer_s, cut_s, layer_bytes, table.num_ranks, memory_bytes=room, time_limit_s=3.0)
    if found is not None:
        reduction = [float(table.reduction_s[a, b]) for a, b in pairwise(found.bounds)]
        yield max(found.value, *reduction), table.partition(found.bounds)


PLANNER = table_planner(
    "tarnawski-ip",
    PAPER,
    _solve_one,
    reach=Reach(),
    lower_bound=lambda table: table.least_rate_s,
    objective="seconds of the largest load",
)
