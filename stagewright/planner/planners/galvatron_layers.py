"""Galvatron's strategies by layer on one pipeline rank: tp, dp and recomputation of each layer, with resharding between them.

On W devices and a microbatch of M samples a layer's strategy S is tp * dp = W, dp a divisor of M, and a recomputation level. With T
microbatches, one of them in flight, and the layer's costs from the common cost model,

    c(L, S) = T (t + recompute) + gradient reduction + optimizer       mem(L, S) = states + kept
    R(S, S') = T x all-gather of the boundary tensor                   `planner.layerwise`; infinite unless replicas nest

`galvatron.layer_strategies` is exact for their sum under a budget in UNITS of what a device has beside the largest workspace, which
is enumerated. Neighbouring layers of equal degrees form a stage. ZeRO, sequence parallelism and pipelines are not chosen by
layer, and models whose layers share weights are left to strategies that are equal for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.plan import Degrees, Plan, RankMapping, StagePlan
from stagewright.planner.layerwise import Change, layerwise_schedule
from stagewright.planner.search.layer_costs import Configuration, LayerCosts
from stagewright.planner.search.problem import NO_PREDICTION, Problem, recompute_runs
from stagewright.planner.search.space import PIPELINE_OUTSIDE, allows, divisors

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Solve = Callable[[Floats, Ints, Floats, int], tuple[float, tuple[int, ...]] | None]

UNITS = 400


@dataclass(frozen=True, eq=False)
class Strategy:
    """Degrees and recomputation level of a layer, with the costs of all layers under the degrees."""

    degrees: Degrees
    level: int
    costs: LayerCosts


def strategies_of(problem: Problem, samples: int) -> list[Strategy]:
    """Return what a layer may choose for microbatches of `samples`."""
    space, devices = problem.job.space, problem.num_devices
    model = problem.model(PIPELINE_OUTSIDE)
    found = []
    for tp in divisors(devices):
        dp = devices // tp
        degrees = Degrees(tp=tp, dp=dp)
        if samples % dp or not (allows(space, "tp", tp) and allows(space, "dp", dp)):
            continue
        if not allows(space, "microbatch", samples // dp) or samples // dp > space.max_microbatch:
            continue
        if model.legality(degrees, samples // dp) is None:
            configuration = Configuration(degrees, 1, samples // dp, problem.job.global_batch // samples)
            found += [Strategy(degrees, level, problem.costs(configuration)) for level in problem.levels]
    return found


def change_s(first: Strategy, second: Strategy, layer: int, problem: Problem) -> float:
    """Return the seconds of resharding one microbatch before a layer; infinite where replicas do not nest."""
    low, high = sorted((first, second), key=lambda strategy: strategy.degrees.dp)
    if low.degrees.dp == high.degrees.dp:
        return 0.0
    if high.degrees.dp % low.degrees.dp or low.degrees.tp % high.degrees.tp:
        return float("inf")
    change = Change(0, high.degrees.dp // low.degrees.dp, high.degrees.tp, grows=second is high)
    return change.seconds(float(low.costs.cut_bytes[layer]), problem.cluster.groups[0])


def layerwise_plan(problem: Problem, samples: int, solve: Solve, planner: str) -> tuple[float, Plan] | None:
    """Return the best value and plan of strategies by layer for microbatches of `samples`; None when nothing fits."""
    strategies = strategies_of(problem, samples)
    if not strategies:
        return None
    count, layers = problem.job.global_batch // samples, problem.profile.num_layers
    changes = count * np.array(
        [
            [[change_s(first, second, layer, problem) for second in strategies] for first in strategies]
            for layer in range(1, layers)
        ]
    ).reshape(layers - 1, len(strategies), len(strategies))
    seconds = np.stack(
        [count * (each.costs.time_s + each.costs.recompute_s[each.level]) + each.costs.step_s for each in strategies],
        axis=1,
    )
    held = np.stack([each.costs.static_bytes + each.costs.kept_bytes[each.level] for each in strategies], axis=1)
    workspace = np.stack([each.costs.workspace_bytes[each.level] for each in strategies], axis=1)
    best: tuple[float, tuple[int, ...]] | None = None
    for ceiling in np.unique(workspace).tolist():
        room = problem.capacity_bytes - problem.base_bytes - ceiling
        if room <= 0:
            break
        units = np.minimum(np.ceil(held / room * UNITS * (1 - 1e-12)), UNITS + 1).astype(np.int64)
        found = solve(np.where(workspace <= ceiling, seconds, np.inf), units, changes, UNITS)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return (
        None if best is None else (best[0], _plan(problem, [strategies[index] for index in best[1]], samples, planner))
    )


def _plan(problem: Problem, chosen: list[Strategy], samples: int, planner: str) -> Plan:
    """Return the plan document, its prediction still empty."""
    profile, group = problem.profile, problem.cluster.groups[0].name
    stages, first = [], 0
    for degrees, run in groupby(chosen, key=lambda strategy: strategy.degrees):
        levels = tuple(strategy.level for strategy in run)
        stages.append(
            StagePlan(
                layers=(first, first + len(levels)), degrees=degrees, recompute=recompute_runs(levels), group=group
            )
        )
        first += len(levels)
    count = problem.job.global_batch // samples
    return Plan(
        model=profile.name,
        profile_digest=profile.digest,
        layer_digest=profile.layer_digest,
        num_layers=profile.num_layers,
        cluster=problem.cluster,
        job=problem.job,
        planner=planner,
        stages=tuple(stages),
        mapping=RankMapping(axis_order=PIPELINE_OUTSIDE, pipeline_ranks=(tuple(range(problem.num_devices)),)),
        schedule=layerwise_schedule(len(stages), count, samples // stages[0].degrees.dp),
        prediction=NO_PREDICTION,
    )
