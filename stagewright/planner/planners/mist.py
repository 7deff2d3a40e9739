"""Mist (Zhu et al., EuroSys 2025): Pareto points inside stages, an integer programme between them.

A stage of layers [i, j) at position s offers points (t, d): seconds of a steady microbatch, and what the first and last
ones add (gradients reduced, optimizer run, offloaded states streamed). One binary y for each offered point; the stages of
a pipeline are a path:

    min (G - 1) z + sum t y + w
    s.t.  sum_jk y[s, i, j, k] = sum_hk y[s - 1, h, i, k]  for all s > 0, i;   sum y[0, 0, ..] = 1 = sum y[D - 1, .., L]
          z >= sum t y[s]  for all s;     w >= sum d y[s] - sum_{r < s} sum t y[r]  for all s

modelled in PuLP, solved by HiGHS, exact for this objective over the points offered. A point is an option k, which is a ZeRO
stage and a share of the optimizer's states on the host, with the least recomputation that fits under it, by the exact
knapsack. With `per_stage_degrees` every stage chooses its own option, of all ZeRO stages and shares 0, 1/2 and 1; else
the options are the configuration's ZeRO stage alone and states stay on the device, as the other planners' do. Points that
another one equals or beats in t and d are dropped. tp, dp and the microbatch are the configuration's, equal on all stages.

The programme runs on the NUM_PROGRAMS configurations whose balanced pipelines are fastest, for a few seconds each; the
plans are ranked by the common simulator, the uniform ones among them, so that the answer is never behind those. Ranges
more than SLACK above the best bottleneck are left out. Offload of weights, gradients and activations, Mist's other
levers, is not a level that plans hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pulp

from stagewright.planner.cost.matrix_optimizer import MATRIX_OPTIMIZERS
from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Plan
from stagewright.planner.planners.range_cuts import least_bottleneck
from stagewright.planner.planners.reach import Reach
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import Choice, choices_outcome, choices_over, with_plans
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Candidate, Partition, Problem
from stagewright.planner.search.space import allows

Floats = npt.NDArray[np.float64]

SLACK = 1.1
NUM_PROGRAMS = 6
OFFLOAD_SHARES = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class StageChoice:
    """A partition with the option of each stage, and the objective's value."""

    value: float
    bounds: tuple[int, ...]
    options: tuple[int, ...]


def inter_stage(
    steady_s: Floats, once_s: Floats, num_microbatches: int, *, time_limit_s: float = 3.0
) -> StageChoice | None:
    """Return the partition and options of least objective; None when there are none.

    Parameters
    ----------
    steady_s : [K, D, L + 1, L + 1], seconds of a microbatch; infinite where no point is offered.
    once_s : [K, L + 1, L + 1], seconds once a step.
    """
    stages, layers = steady_s.shape[1], steady_s.shape[2] - 1
    scale = 1.0 / float(steady_s[np.isfinite(steady_s)].max(initial=1e-12))
    offered = pareto_points(steady_s, once_s)
    arcs = {
        (int(s), int(i), int(j), int(k)): pulp.LpVariable(f"y_{s}_{i}_{j}_{k}", cat="Binary")
        for k, s, i, j in zip(*np.nonzero(offered), strict=True)
        if (i == 0) == (s == 0) and (j == layers) == (s == stages - 1)
    }
    model = pulp.LpProblem("inter_stage", pulp.LpMinimize)
    slowest, wait = pulp.LpVariable("slowest", 0), pulp.LpVariable("wait", 0)
    by_stage = [[(key, y) for key, y in arcs.items() if key[0] == s] for s in range(stages)]
    steady = [pulp.lpSum(scale * float(steady_s[k, s, i, j]) * y for (s, i, j, k), y in row) for row in by_stage]
    model += (num_microbatches - 1) * slowest + pulp.lpSum(steady) + wait
    for s, row in enumerate(by_stage):
        model += slowest >= steady[s]
        once = pulp.lpSum(scale * float(once_s[k, i, j]) * y for (_, i, j, k), y in row)
        model += wait >= once - pulp.lpSum(steady[:s])
        model += pulp.lpSum(y for _, y in row) == 1
    for s in range(1, stages):
        for i in range(1, layers):
            leaves = pulp.lpSum(y for key, y in by_stage[s] if key[1] == i)
            enters = pulp.lpSum(y for key, y in by_stage[s - 1] if key[2] == i)
            model += leaves == enters
    model.solve(pulp.HiGHS(msg=False, timeLimit=time_limit_s, gapRel=1e-6))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    chosen = sorted(key for key, y in arcs.items() if (y.value() or 0.0) > 0.5)
    times = [float(steady_s[k, s, i, j]) for s, i, j, k in chosen]
    waits = [float(once_s[k, i, j]) - sum(times[:s]) for s, i, j, k in chosen]
    return StageChoice(
        (num_microbatches - 1) * max(times) + sum(times) + max(0.0, *waits),
        (0, *(end for _, _, end, _ in chosen)),
        tuple(k for _, _, _, k in chosen),
    )


def pareto_points(steady_s: Floats, once_s: Floats) -> npt.NDArray[np.bool_]:
    """Return which points no other option of the same range equals or beats in both, [K, D, L + 1, L + 1]."""
    offered = np.isfinite(steady_s)
    for k in range(len(steady_s)):
        for other in range(len(steady_s)):
            if other == k:
                continue
            no_worse = (steady_s[other] <= steady_s[k]) & (once_s[other] <= once_s[k])[None]
            better = (steady_s[other] < steady_s[k]) | (once_s[other] < once_s[k])[None]
            offered[k] &= ~(no_worse & (better | (other < k)))
    return np.asarray(offered)


@dataclass(frozen=True)
class Option:
    """What a stage may do with its states: the table of costs under a ZeRO stage and a share offloaded."""

    zero: int
    offloaded: float
    table: StageTable


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of least simulated step among those of the NUM_PROGRAMS most promising configurations."""
    rough = choices_over(problem, limits, _REACH, _balanced)
    by_stage = problem.job.space.per_stage_degrees
    plans: list[tuple[float, Plan]] = []
    for candidate in _promising(problem, limits, rough, by_stage=by_stage):
        if limits.reached() is not None:
            break
        found = _solve_one(_options(problem, candidate, by_stage=by_stage))
        if found is not None:
            options, choice = found
            plans.append((choice.value, _plan(problem, candidate, options, choice)))
    return with_plans(problem, limits, choices_outcome(problem, limits, rough, PLANNER.name), plans)


def _promising(problem: Problem, limits: Limits, rough: Sequence[Choice], *, by_stage: bool) -> list[Candidate]:
    """Return the configurations whose balanced pipelines are fastest, each once whatever its ZeRO stage where stages choose."""
    ranked = sorted(rough, key=lambda choice: choice.value)
    if by_stage and not ranked:
        # Nothing fits with the states on the device: configurations by their time alone.
        ranked = sorted(choices_over(problem, limits, _REACH, _unlimited), key=lambda choice: choice.value)
    found: dict[object, Candidate] = {}
    for choice in ranked:
        configuration = choice.candidate.configuration
        plain = configuration.degrees.model_copy(update={"zero": 0})
        found.setdefault(replace(configuration, degrees=plain) if by_stage else configuration, choice.candidate)
    return list(found.values())[:NUM_PROGRAMS]


def _options(problem: Problem, candidate: Candidate, *, by_stage: bool) -> list[Option]:
    """Return what every stage of a configuration may choose."""
    own = candidate.configuration.degrees.zero
    if not by_stage:
        return [Option(own, 0.0, StageTable(problem, candidate))]
    space = problem.job.space
    replicated = candidate.configuration.degrees.dp * candidate.configuration.degrees.cp > 1
    zeros = [zero for zero in sorted(set(space.zero)) if allows(space, "zero", zero)] if replicated else [own]
    streams = problem.job.optimizer.name not in MATRIX_OPTIMIZERS  # whose states are wanted whole
    has_host = problem.cluster.groups[0].device.host_bytes_per_s is not None
    shares = OFFLOAD_SHARES if streams and has_host else (0.0,)
    found = []
    for zero in zeros:
        degrees = candidate.configuration.degrees.model_copy(update={"zero": zero})
        here = replace(candidate, configuration=replace(candidate.configuration, degrees=degrees))
        found += [Option(zero, share, StageTable(problem, here, share)) for share in shares]
    return found


def _solve_one(options: list[Option]) -> tuple[list[Option], StageChoice] | None:
    """Return the options that offer points, and the best of them for each stage."""
    first = options[0].table
    found = [(option, option.table.with_least_recompute(option.table.time_s, slack=SLACK)) for option in options]
    offering = [(option, steady) for option, steady in found if steady is not None]
    if not offering:
        return None
    steady_s = np.stack([steady for _, steady in offering])
    balanced = least_bottleneck(steady_s.min(axis=0), first.num_ranks)
    if balanced is None:
        return None
    steady_s = np.where(steady_s <= SLACK * balanced.value, steady_s, np.inf)
    once_s = np.stack([option.table.step_s for option, _ in offering])
    choice = inter_stage(steady_s, once_s, first.num_microbatches)
    return None if choice is None else ([option for option, _ in offering], choice)


def _plan(problem: Problem, candidate: Candidate, options: Sequence[Option], choice: StageChoice) -> Plan:
    """Return the plan document with the option of each stage, its prediction still empty."""
    levels: tuple[int, ...] = ()
    for stage, (first, end) in enumerate(pairwise(choice.bounds)):
        table = options[choice.options[stage]].table
        levels += table.least_levels(first, end, table.in_flight(stage))
    plan = problem.plan(candidate, Partition(choice.bounds, levels), PLANNER.name)
    stages = tuple(
        stage.model_copy(
            update={
                "degrees": stage.degrees.model_copy(update={"zero": options[option].zero}),
                "optimizer_offload": options[option].offloaded,
            }
        )
        for stage, option in zip(plan.stages, choice.options, strict=True)
    )
    return plan.model_copy(update={"stages": stages})


def _balanced(table: StageTable) -> Iterator[tuple[float, Partition]]:
    """Yield the objective of the partition whose slowest stage is fastest, with one level a stage."""
    cost = table.with_uniform_levels(table.time_s)
    found = least_bottleneck(cost, table.num_ranks)
    partition = None if found is None else table.fitted(found.bounds)
    if found is not None and partition is not None:
        times = [float(cost[stage][first, end]) for stage, (first, end) in enumerate(pairwise(found.bounds))]
        once = float(table.step_s[found.bounds[0], found.bounds[1]])
        yield (table.num_microbatches - 1) * max(times) + sum(times) + once, partition


def _unlimited(table: StageTable) -> Iterator[tuple[float, Partition]]:
    """Yield the same without asking for memory."""
    found = least_bottleneck(table.time_s, table.num_ranks)
    if found is not None:
        times = [float(table.time_s[first, end]) for first, end in pairwise(found.bounds)]
        yield (table.num_microbatches - 1) * max(times) + sum(times), table.partition(found.bounds)


_REACH = Reach(tensor=True, zero=(0, 1, 2, 3), axis_orders=True)

PLANNER = NamedPlanner(
    "mist",
    "Zhu et al., Mist: Efficient Distributed Training of Large Language Models via Memory-Parallelism Co-Optimization, "
    "EuroSys 2025",
    solve,
    objective="(G - 1) max t + sum t + exposed d, seconds",
    by_stage=True,
)
