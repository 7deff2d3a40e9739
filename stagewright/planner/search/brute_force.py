"""Every partition and every recomputation of a candidate, simulated: the oracle of all other solvers.

C(L - 1, S - 1) partitions times K^L levels, layer by layer: for at most about 8 layers. Completions of a partition are
simulated with links that never wait, then, from the fastest on, with links that do, until none left can be faster. It
shares with the solvers it checks only the layer costs, the wiring and the simulators; nothing is bounded or merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.layer_costs import LayerCosts
from stagewright.planner.search.order import Order
from stagewright.planner.search.pipeline_costs import Tie, Wiring, hop_seconds, replica_seconds, tie_seconds
from stagewright.planner.search.problem import Candidate, Partition, Problem
from stagewright.planner.search.stage_candidate import StageCandidate

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


def all_partitions(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """Yield the bounds of every way to cut `num_layers` into `num_stages` ranges, each of at least one layer."""
    for inner in combinations(range(1, num_layers), num_stages - 1):
        yield (0, *inner, num_layers)


def all_levels(num_layers: int, levels: Sequence[int]) -> Longs:
    """Return every assignment of recomputation levels to layers, [K^L, L]."""
    return np.array(list(product(levels, repeat=num_layers)), dtype=np.int64)


def best_of_all(problem: Problem, candidates: Sequence[Candidate]) -> tuple[float, Candidate, Partition] | None:
    """Return the least simulated step over all completions of all candidates that fit; None when nothing fits."""
    best: tuple[float, Candidate, Partition] | None = None
    for candidate in candidates:
        found = best_completion(problem, candidate)
        if found is not None and (best is None or found[0] < best[0]):
            best = (found[0], candidate, found[1])
    return best


def best_completion(problem: Problem, candidate: Candidate) -> tuple[float, Partition] | None:
    """Return the least simulated step of a candidate over all partitions and levels; None when none fits."""
    if not problem.takes(candidate):
        return None
    order, costs = problem.order(candidate), problem.costs(candidate.configuration)
    rooms = np.full(order.num_ranks, problem.capacity_bytes * (1 + 1e-12) - problem.base_bytes)
    stages = _Stages(
        problem,
        order,
        [costs] * order.num_stages,
        problem.wiring(candidate.configuration),
        problem.ties(candidate.configuration),
    )
    return _best(stages, rooms, lambda partition: problem.judged_step_s(candidate, partition))


def best_by_stage(candidate: StageCandidate) -> tuple[float, Partition] | None:
    """Return the same for a candidate whose stages differ, judged as the scorer judges its plan."""
    rooms = np.array([choice.choices.room_bytes * (1 + 1e-12) for choice in candidate.by_stage])
    stages = _Stages(candidate.problem, candidate.order, candidate.layers, candidate.wiring, candidate.ties)
    return _best(
        stages,
        rooms,
        lambda partition: candidate.scored(partition, "exhaustive").prediction.step_time_s,
        admits=lambda bounds: bool(((candidate.windows[:, 0] <= bounds) & (candidate.windows[:, 1] >= bounds)).all()),
    )


@dataclass(frozen=True, eq=False)
class _Stages:
    """What completions of a candidate are made of: an order, the layer costs of each stage, links and shared weights."""

    problem: Problem
    order: Order
    layers: Sequence[LayerCosts]
    wiring: Wiring
    ties: Sequence[Tie]


def _best(
    stages: _Stages,
    rooms: Floats,
    judged_step_s: Callable[[Partition], float],
    *,
    admits: Callable[[tuple[int, ...]], bool] = lambda bounds: True,
) -> tuple[float, Partition] | None:
    order, num_layers = stages.order, stages.layers[0].num_layers
    levels = all_levels(num_layers, stages.problem.levels)
    best: tuple[float, Partition] | None = None
    for bounds in filter(admits, all_partitions(num_layers, order.num_stages)):
        fits = np.flatnonzero((_peaks(stages, bounds, levels) <= rooms).all(axis=1))
        if not len(fits):
            continue
        steps = _steps(stages, bounds, levels[fits])
        for place in np.argsort(steps, kind="stable").tolist():
            if best is not None and steps[place] >= best[0]:
                break
            partition = Partition(bounds, tuple(levels[fits[place]].tolist()))
            step_s = judged_step_s(partition)
            if best is None or step_s < best[0]:
                best = (step_s, partition)
    return best


def _chosen(rows: Floats, levels: Longs) -> Floats:
    """Return rows[level of layer, layer] for every assignment, [n, L]."""
    return np.asarray(rows[levels, np.arange(levels.shape[1])[None, :]])


def _peaks(stages: _Stages, bounds: Sequence[int], levels: Longs) -> Floats:
    """Return the peak of each rank under every assignment of levels, [n, D]."""
    order = stages.order
    peaks = np.zeros((len(levels), order.num_ranks))
    for rank, slots in enumerate(order.slots):
        live = order.live[rank]
        vectors = np.zeros((len(levels), len(live)))
        most = np.zeros(len(levels))
        for place, slot in enumerate(slots):
            costs, inside = stages.layers[slot.stage], slice(bounds[slot.stage], bounds[slot.stage + 1])
            kept = _chosen(costs.kept_bytes, levels)
            late = _chosen(costs.late_bytes, levels)
            vectors += np.outer(kept[:, inside].sum(axis=1), live[:, 0, place])
            vectors += np.outer(late[:, inside].sum(axis=1), live[:, 1, place])
            most = np.maximum(most, _chosen(costs.workspace_of(order), levels)[:, inside].max(axis=1))
            peaks[:, rank] += costs.static_bytes[inside].sum()
        peaks[:, rank] += vectors.max(axis=1) + most
    return peaks


def _steps(stages: _Stages, bounds: Sequence[int], levels: Longs) -> Floats:
    """Return the simulated step under every assignment of levels, [n]."""
    order, profile = stages.order, stages.problem.profile
    overhead_s = profile.action_overhead_s
    times = np.zeros((len(levels), 3, order.num_stages))
    tail = np.zeros(order.num_ranks)
    for stage, costs in enumerate(stages.layers):
        inside = slice(bounds[stage], bounds[stage + 1])
        recompute = _chosen(costs.recompute_s, levels)[:, inside].sum(axis=1)
        times[:, 0, stage] = costs.forward_s[inside].sum() + overhead_s
        times[:, 1, stage] = costs.input_grad_s[inside].sum() + recompute + overhead_s
        times[:, 2, stage] = costs.weight_grad_of(order)[inside].sum() + (overhead_s if order.split else 0.0)
        for row in order.placement:
            tail[row[stage]] += costs.step_s[inside].sum() + costs.stage_latency_s
    tail += tie_seconds(order, bounds, stages.wiring, stages.ties)
    tail += replica_seconds(order, bounds, stages.layers, stages.wiring)
    hops = hop_seconds(order, bounds, stages.layers, stages.wiring)
    steps = order.makespans(times, np.tile(hops, (len(levels), 1)), np.tile(tail, (len(levels), 1)))
    return np.asarray(steps + profile.step_overhead_s)
