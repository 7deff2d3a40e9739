"""AdaPtis: partition, placement and order of a pipeline together, for layers that differ.

A partition cuts N layers into S = v D stages at 0 = c_0 < c_1 < ... < c_S = N; a placement (loop or wave, v chunks) puts the
stages on ranks; an order fills the ranks' lists. For one placement the three are improved in turn:

1. partition: least longest stage, by the interval programme L(j, s) = min over i < j of max(L(i, s - 1), work(i, j));
2. order: a few list schedules and a short annealing (`auto`), whose makespan is the value of the partition;
3. partition again: each cut next to a stage of the busiest rank moves by one layer, each move is valued by 2,
   and the best one is kept while it lowers the value, at most `ROUNDS` times.

The placements are visited in the order of their values, and the best `FINALISTS` get the whole search of `auto`. The even
partition (equal counts of layers) is among the starts, so the result is not worse than what the same search values highest on it; there is no
optimality over partitions. O(S N^2) for the programme and O(S) valuations a round.

The idea follows the abstract of: AdaPtis: Reducing Pipeline Bubbles with Adaptive Pipeline Parallelism on Heterogeneous Models,
2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.schedules.auto import AutoRequest, AutoResult, search
from stagewright.planner.schedules.auto.annealing import anneal
from stagewright.planner.schedules.auto.climbing import climb_targets
from stagewright.planner.schedules.auto.instance import Instance, make_instance
from stagewright.planner.schedules.auto.request import DEFAULT_CHUNKS
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import loop_placement, wave_placement

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

ROUNDS = 12
FINALISTS = 2
_CLIMBS, _MOVES = 16, 2_000  # of one valuation


@dataclass(frozen=True, eq=False)
class CoOptimized:
    """Cuts [num_stages + 1] in layers, and the order found for them on the placement that `auto` names."""

    cuts: tuple[int, ...]
    found: AutoResult


@dataclass(frozen=True, eq=False)
class _Site:
    placement: Ints
    cuts: tuple[int, ...]
    value_s: float


def co_optimized(
    layers: StageCosts,
    *,
    num_ranks: int,
    num_microbatches: int,
    latency_s: float = 0.0,
    memory_cap: float | None = None,
    chunk_counts: tuple[int, ...] = DEFAULT_CHUNKS,
    evaluations: int = 200_000,
    seed: int = 0,
) -> CoOptimized:
    """Return the best partition, placement and order met; `evaluations` are those of each final search.

    Raises InvalidArgument when there are fewer layers than ranks, Infeasible when no partition met keeps the cap.
    """
    if layers.num_stages < num_ranks:
        raise InvalidArgument(
            f"{layers.num_stages} layers cannot be cut into {num_ranks} stages, one for each rank", field="layers"
        )
    common = (num_ranks, num_microbatches, latency_s, memory_cap)
    sites = []
    for placement in _placements(num_ranks, chunk_counts, layers.num_stages):
        site = _improved(layers, placement, common, seed)
        if site is not None:
            sites.append(site)
    if not sites:
        raise Infeasible(
            f"no partition of {layers.num_stages} layers over {num_ranks} ranks keeps the cap of {memory_cap}",
            field="memory_cap",
            hint=f"a rank's even share of one microbatch is {float(layers.activation.sum()) / num_ranks:g}",
        )
    answers = []
    for site in sorted(sites, key=lambda each: each.value_s)[:FINALISTS]:
        request = AutoRequest(
            num_ranks, num_microbatches, partitioned(layers, site.cuts), latency_s, memory_cap, site.placement,
            evaluations=evaluations, seed=seed,
        )  # fmt: skip
        answers.append(CoOptimized(site.cuts, search(request)))
    return min(answers, key=lambda answer: answer.found.makespan_s)


def partitioned(layers: StageCosts, cuts: tuple[int, ...]) -> StageCosts:
    """Return the costs of the stages between neighbouring cuts."""

    def total(values: Floats) -> Floats:
        sums: Floats = np.add.reduceat(values, cuts[:-1])
        return sums

    activation, freed = total(layers.activation), total(layers.activation * layers.freed_at_input_grad)
    return StageCosts.of(
        total(layers.forward_s),
        total(layers.input_grad_s),
        total(layers.weight_grad_s),
        activation=activation,
        freed_at_input_grad=np.divide(freed, activation, out=np.zeros_like(freed), where=activation > 0.0),
        recompute_s=total(layers.recompute_s),
    )


def even_cuts(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return cuts into stages whose counts of layers differ by at most one."""
    return tuple(round(stage * num_layers / num_stages) for stage in range(num_stages + 1))


def balanced_cuts(work_s: Floats, num_stages: int) -> tuple[int, ...]:
    """Return the cuts of least longest stage, by the interval programme."""
    count = len(work_s)
    before = np.concatenate(([0.0], np.cumsum(work_s)))
    longest = np.full((num_stages + 1, count + 1), np.inf)
    last = np.zeros((num_stages + 1, count + 1), dtype=np.int64)
    longest[0, 0] = 0.0
    for stage in range(1, num_stages + 1):
        for end in range(stage, count + 1):
            values = np.maximum(longest[stage - 1, :end], before[end] - before[:end])
            last[stage, end] = int(np.argmin(values))
            longest[stage, end] = values[last[stage, end]]
    cuts = [count]
    for stage in range(num_stages, 0, -1):
        cuts.append(int(last[stage, cuts[-1]]))
    return tuple(cuts[::-1])


def _placements(num_ranks: int, chunk_counts: tuple[int, ...], num_layers: int) -> list[Ints]:
    found = []
    for chunks in sorted(set(chunk_counts)):
        if chunks * num_ranks <= num_layers:
            found.append(loop_placement(num_ranks, chunks)[0])
            if num_ranks > 1 and chunks % 2 == 0:
                found.append(wave_placement(num_ranks, chunks)[0])
    return found or [loop_placement(num_ranks)[0]]


def _improved(
    layers: StageCosts, placement: Ints, common: tuple[int, int, float, float | None], seed: int
) -> _Site | None:
    """Return the best partition met on the placement, None when no start keeps the cap."""
    stages = len(placement)
    work_s = layers.forward_s + layers.input_grad_s + layers.weight_grad_s + layers.recompute_s
    known: dict[tuple[int, ...], float] = {}

    def value_s(cuts: tuple[int, ...]) -> float:
        if cuts not in known:
            known[cuts] = _value_s(partitioned(layers, cuts), placement, common, seed)
        return known[cuts]

    cuts = min((balanced_cuts(work_s, stages), even_cuts(len(work_s), stages)), key=value_s)
    for _ in range(ROUNDS):
        if not np.isfinite(value_s(cuts)):
            return None
        best = min(_moved(cuts, placement, work_s), key=value_s, default=cuts)
        if value_s(best) >= value_s(cuts) * (1.0 - 1e-9):
            break
        cuts = best
    return _Site(placement, cuts, value_s(cuts))


def _moved(cuts: tuple[int, ...], placement: Ints, work_s: Floats) -> list[tuple[int, ...]]:
    """Return the partitions with one layer less, or more, on a stage of the busiest rank."""
    stage_s = np.add.reduceat(work_s, cuts[:-1])
    busiest = int(np.argmax(np.bincount(placement, weights=stage_s)))
    moved = []
    for cut in range(1, len(cuts) - 1):
        if busiest not in (placement[cut - 1], placement[cut]):
            continue
        for step in (-1, 1):
            place = cuts[cut] + step
            if cuts[cut - 1] < place < cuts[cut + 1]:
                moved.append((*cuts[:cut], place, *cuts[cut + 1 :]))
    return moved


def _value_s(costs: StageCosts, placement: Ints, common: tuple[int, int, float, float | None], seed: int) -> float:
    """Return the makespan of a quickly made order, infinite when one microbatch exceeds the cap."""
    ranks, count, latency_s, memory_cap = common
    try:
        instance: Instance = make_instance(
            costs, placement, num_ranks=ranks, num_microbatches=count, latency_s=latency_s, memory_cap=memory_cap
        )
    except Infeasible:
        return float("inf")
    _, words = climb_targets(instance, evaluations=_CLIMBS, seed=seed)
    temperature_s = 0.03 * float(instance.tables.duration_s.mean())
    makespan_s, _, _ = anneal(instance, words, moves=_MOVES, temperature_s=temperature_s, bound_s=0.0, seed=seed)
    return makespan_s
