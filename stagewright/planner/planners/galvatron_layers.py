"""Galvatron's strategies by layer on one pipeline rank: tp, dp, ZeRO and recomputation of each layer, with resharding between them.

On W devices and a microbatch of M samples a layer's strategy S is tp * dp = W, dp a divisor of M, DP or SDP (ZeRO-3), and a
recomputation level; sequence and vocabulary parallelism are on wherever a problem has them on, as in all of Galvatron's plans here.
With T microbatches, one of them in flight, and the layer's costs from the common cost model,

    c(L, S) = T (t + recompute) + gradient reduction + optimizer       mem(L, S) = states + kept
    R(S, S') = T x all-gathers of the boundary tensor                  `planner.layerwise`; infinite unless replicas nest

and infinite between a head that splits the vocabulary and its loss. `galvatron.layer_strategies` is exact for their sum under a
budget in UNITS of what a device has beside the largest workspace, which is enumerated. Neighbouring layers of equal degrees form a
stage. Pipelines are not chosen by layer, and models whose layers share weights or are no chain, which no run takes
so, are left to strategies that are equal for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.plan import Degrees, Plan, RankMapping, StagePlan
from stagewright.planner.layerwise import change_between, layerwise_schedule
from stagewright.planner.search.layer_costs import Configuration, LayerCosts
from stagewright.planner.search.problem import NO_PREDICTION, Problem, recompute_runs
from stagewright.planner.search.space import PIPELINE_OUTSIDE, allows, inner_splits

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


def strategies_of(problem: Problem, samples: int, zero_stages: Sequence[int]) -> list[Strategy]:
    """Return what a layer may choose for microbatches of `samples`; replicas may divide states as `zero_stages` say."""
    found = []
    for degrees in _degrees(problem, zero_stages):
        share = samples // degrees.dp
        if samples % degrees.dp or not allows(problem.job.space, "microbatch", share):
            continue
        if share > problem.job.space.max_microbatch:
            continue
        if problem.model(PIPELINE_OUTSIDE).legality(degrees, share) is None:
            costs = problem.costs(_configuration(problem, degrees, samples))
            found += [Strategy(degrees, level, costs) for level in problem.levels]
    return found


def _degrees(problem: Problem, zero_stages: Sequence[int]) -> Iterator[Degrees]:
    """Yield tensor and data degrees on all devices, with sequence and vocabulary parallelism where the problem has them on."""
    space, devices = problem.job.space, problem.num_devices
    per_node = max(group.devices_per_node for group in problem.cluster.groups)
    for tp, cp, variants in inner_splits(problem.profile, problem.job, devices, per_node):
        dp = devices // tp
        if cp > 1 or not variants or not allows(space, "dp", dp):
            continue
        sp, vocab_parallel = max(variants)
        for zero in zero_stages if dp > 1 else (0,):  # one replica has nothing to divide
            yield Degrees(tp=tp, dp=dp, sp=bool(sp), vocab_parallel=bool(vocab_parallel), zero=zero)


def _configuration(problem: Problem, degrees: Degrees, samples: int) -> Configuration:
    return Configuration(degrees, 1, samples // degrees.dp, problem.job.global_batch // samples)


def changes_s(problem: Problem, strategies: Sequence[Strategy], samples: int) -> Floats:
    """Return the seconds of resharding one microbatch in front of each layer but the first, [L - 1, S, S]."""
    kinds = [problem.profile.classes[name].kind for name in problem.profile.layer_classes]
    degrees = list(dict.fromkeys(strategy.degrees for strategy in strategies))
    of_strategy = [degrees.index(strategy.degrees) for strategy in strategies]
    whole = degrees[0].model_copy(update={"sp": False})
    bytes_per_sample = problem.costs(_configuration(problem, whole, samples)).cut_bytes / (samples // whole.dp)
    blocks = [index for index, kind in enumerate(kinds) if kind == "block"]
    known: dict[tuple[float, bool, tuple[str, str]], Floats] = {}
    found = []
    for layer in range(1, problem.profile.num_layers):
        around = (kinds[layer - 1], kinds[layer])
        key = (float(bytes_per_sample[layer]), bool(blocks) and blocks[0] < layer <= blocks[-1] + 1, around)
        if key not in known:
            rows = [
                [_change_s(problem, (first, second), layer, kinds, key[0] * samples) for second in degrees]
                for first in degrees
            ]
            known[key] = np.array(rows)[np.ix_(of_strategy, of_strategy)]
        found.append(known[key])
    return np.array(found).reshape(-1, len(strategies), len(strategies))


def _change_s(
    problem: Problem, pair: tuple[Degrees, Degrees], layer: int, kinds: Sequence[str], size_bytes: float
) -> float:
    """Return the seconds between two degrees, given the whole tensor of a microbatch; infinite where that cannot be."""
    first, second = pair
    if first == second:
        return 0.0
    low, high = sorted(pair, key=lambda degrees: degrees.dp)
    splits = first.vocab_parallel or second.vocab_parallel
    if high.dp % low.dp or low.tp % high.tp or (splits and (kinds[layer - 1], kinds[layer]) == ("head", "loss")):
        return float("inf")
    change = change_between(first, second, layer, kinds, stage=0)
    if change is None:
        return 0.0
    group = problem.cluster.groups[0]
    return sum(gather.seconds(group) for each in change.gathers(size_bytes / first.dp) for gather in each)


def layerwise_plan(
    problem: Problem, samples: int, solve: Solve, planner: str, zero_stages: Sequence[int]
) -> tuple[float, Plan] | None:
    """Return the best value and plan of strategies by layer for microbatches of `samples`; None when nothing fits."""
    strategies = strategies_of(problem, samples, zero_stages)
    if not strategies:
        return None
    count = problem.job.global_batch // samples
    changes = count * changes_s(problem, strategies, samples)
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
