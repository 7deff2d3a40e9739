"""Tessel: a repeating unit ("repetend") of few microbatches with the shortest period, then unrolled.

Every action b of a microbatch (F, then B or I and W of each virtual stage, on the rank that holds it) gets a start t[b] in
one period of its rank and an offset n[b] of whole periods; microbatch m runs it at t[b] + (n[b] + m) P. For a period P

    t[c] + n[c] P >= t[b] + n[b] P + d[b] (+ latency)     for b before c
    t[b] - t[c] >= d[c]  or  t[c] - t[b] >= d[b]          for b, c on one rank
    u[r] <= t[b] <= u[r] + P - d[b],  0 <= n[b] < N       u[r] is the phase of rank r

is a mixed integer programme in PuLP. P is bisected between the busiest rank's work, which no period can undercut, and the
serial time; for standard placements the bound is reached. Sorting the unrolled starts gives each rank's order, which is
free of deadlock because it is the order of a schedule with times. A cap on live activations is checked on the unrolled
order, and N grows from 1 until it is met with the shortest period.

Minimal period for the given N; the makespan for few microbatches is not claimed to be minimal.

Paper: Lin et al., Tessel: Boosting Distributed Execution of Large DNN Models via Flexible Schedule Search, HPCA 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pulp

from stagewright.planner.errors import Infeasible
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.schedules.schedule import Schedule, encode, wave_placement
from stagewright.planner.schedules.sizes import costs_of, require, sizes_of

MOST_MICROBATCHES = 6
PERIOD_TOLERANCE = 1e-6
TIME_LIMIT_S = 60.0


@dataclass(frozen=True)
class Repetend:
    """One period: (kind, stage), start and offset of each action of a microbatch."""

    period_s: float
    actions: tuple[tuple[Kind, int], ...]
    start_s: tuple[float, ...]
    offset: tuple[int, ...]


def tessel(request: ScheduleRequest) -> Schedule:
    """Return the unrolled repetend on the request's placement, or on a V of two chunks."""
    chunks = 2 if request.num_chunks is None and request.placement is None else None
    sizes = sizes_of(request, "tessel", default_chunks=chunks or 1, most_chunks=None)
    placement = wave_placement(sizes.num_ranks, sizes.num_chunks) if request.placement is None else request.placement
    require(
        placement.shape == (1, sizes.num_stages),
        f"placement has shape {placement.shape}, {sizes.num_stages} stages need (1, {sizes.num_stages})",
        field="placement",
    )
    costs = costs_of(request, sizes)
    problem = _Problem(placement[0], costs, request.latency_s)
    found: Schedule | None = None
    best = np.inf
    for most in range(1, MOST_MICROBATCHES + 1):
        repetend = shortest_repetend(problem, most, upper_s=best)
        if repetend is None:
            continue
        schedule = unrolled(repetend, placement, sizes.num_microbatches)
        if request.memory_cap is None or _peak(schedule, costs) <= request.memory_cap + 1e-9:
            found, best = schedule, repetend.period_s
            if best <= problem.least_period_s * (1 + PERIOD_TOLERANCE):
                break
    if found is None:
        raise Infeasible(
            f"no repetend of up to {MOST_MICROBATCHES} microbatches fits {request.memory_cap:g} activations",
            field="memory_cap",
            hint="give a larger cap, or take v-min",
        )
    return found


class _Problem:
    """The actions of one microbatch with durations, ranks and precedences."""

    def __init__(self, rank_of_stage: npt.NDArray[np.int32], costs: StageCosts, latency_s: float) -> None:
        stages = range(len(rank_of_stage))
        self.actions = [(kind, stage) for stage in stages for kind in (Kind.F, Kind.I, Kind.W)]
        seconds = {Kind.F: costs.forward_s, Kind.I: costs.input_grad_s, Kind.W: costs.weight_grad_s}
        self.seconds = [float(seconds[kind][stage]) for kind, stage in self.actions]
        self.rank = [int(rank_of_stage[stage]) for _, stage in self.actions]
        index = {action: position for position, action in enumerate(self.actions)}
        last = len(rank_of_stage) - 1
        self.before = [(index[Kind.F, last], index[Kind.I, last], 0.0)]
        for stage in stages:
            self.before.append((index[Kind.I, stage], index[Kind.W, stage], 0.0))
            if stage < last:
                hop = latency_s if rank_of_stage[stage] != rank_of_stage[stage + 1] else 0.0
                self.before.append((index[Kind.F, stage], index[Kind.F, stage + 1], hop))
                self.before.append((index[Kind.I, stage + 1], index[Kind.I, stage], hop))

    @property
    def least_period_s(self) -> float:
        """The busiest rank's work for one microbatch."""
        return float(np.bincount(self.rank, weights=self.seconds).max())


def shortest_repetend(problem: _Problem, num_microbatches: int, *, upper_s: float = np.inf) -> Repetend | None:
    """Return the repetend of at most `num_microbatches` with the shortest period below `upper_s`, if there is one."""
    low = problem.least_period_s
    high = min(sum(problem.seconds) + sum(hop for _, _, hop in problem.before), upper_s)
    best = _repetend_at(problem, num_microbatches, low)
    if best is not None:
        return best
    while high - low > PERIOD_TOLERANCE * high:
        middle = (low + high) / 2
        found = _repetend_at(problem, num_microbatches, middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
        if high - low < 0.01 * problem.least_period_s:
            break
    return best


def _repetend_at(problem: _Problem, num_microbatches: int, period_s: float) -> Repetend | None:
    model = pulp.LpProblem("repetend", pulp.LpMinimize)
    actions = range(len(problem.actions))
    start = [pulp.LpVariable(f"t_{b}", 0, 2 * period_s) for b in actions]
    offset = [pulp.LpVariable(f"n_{b}", 0, num_microbatches - 1, cat="Integer") for b in actions]
    phase = [pulp.LpVariable(f"u_{rank}", 0, period_s) for rank in range(max(problem.rank) + 1)]
    model += pulp.lpSum(offset)
    for b in actions:
        model += start[b] >= phase[problem.rank[b]]
        model += start[b] <= phase[problem.rank[b]] + period_s - problem.seconds[b]
    for b, c, hop in problem.before:
        model += start[c] + period_s * offset[c] >= start[b] + period_s * offset[b] + problem.seconds[b] + hop
    for b, c in combinations(actions, 2):
        if problem.rank[b] == problem.rank[c]:
            first = pulp.LpVariable(f"x_{b}_{c}", cat="Binary")
            model += start[c] >= start[b] + problem.seconds[b] - 2 * period_s * (1 - first)
            model += start[b] >= start[c] + problem.seconds[c] - 2 * period_s * first
    model.solve(pulp.HiGHS(msg=False, timeLimit=TIME_LIMIT_S))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    return Repetend(
        period_s,
        tuple(problem.actions),
        tuple(float(variable.value()) for variable in start),
        tuple(round(variable.value()) for variable in offset),
    )


def unrolled(repetend: Repetend, placement: npt.NDArray[np.int32], num_microbatches: int) -> Schedule:
    """Return the order of `num_microbatches` copies of the repetend, one period apart."""
    ranks = int(placement.max()) + 1
    timed: list[list[tuple[float, int, Action]]] = [[] for _ in range(ranks)]
    for (kind, stage), start, offset in zip(repetend.actions, repetend.start_s, repetend.offset, strict=True):
        for microbatch in range(num_microbatches):
            time = round(start + (offset + microbatch) * repetend.period_s, 9)
            timed[int(placement[0, stage])].append((time, int(kind), Action(kind, stage, microbatch)))
    orders = tuple(encode([action for _, _, action in sorted(rows)]) for rows in timed)
    return Schedule("tessel", num_microbatches, placement, orders, parameters={"period_s": repetend.period_s})


def _peak(schedule: Schedule, costs: StageCosts) -> float:
    return float(peak_activations(schedule, costs).max())


FAMILY = ScheduleFamily(
    "tessel",
    "Lin et al., Tessel: Boosting Distributed Execution of Large DNN Models via Flexible Schedule Search, HPCA 2024",
    tessel,
    split_backward=True,
    default_chunks=2,
)
