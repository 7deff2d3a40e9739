"""Every partition and every recomputation of a candidate, simulated: the oracle of all other solvers.

C(L - 1, S - 1) partitions (more where the first or the last stage may be empty) times K^L levels: for at most about 8
layers. Shares only the cost arrays and the simulator with the solvers it checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product

from stagewright.planner.search.problem import Candidate, Partition, Problem


def all_partitions(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """Yield the bounds of every way to cut `num_layers` into `num_stages` ranges, each of at least one layer."""
    for inner in combinations(range(1, num_layers), num_stages - 1):
        yield (0, *inner, num_layers)


def all_levels(num_layers: int, levels: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield every assignment of recomputation levels to layers."""
    yield from product(levels, repeat=num_layers)


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
    best: tuple[float, Partition] | None = None
    order = problem.order(candidate)
    for bounds in all_partitions(problem.profile.num_layers, order.num_stages):
        for levels in all_levels(problem.profile.num_layers, problem.levels):
            partition = Partition(bounds, levels)
            if (problem.pipeline(candidate, partition).peak_bytes > problem.capacity_bytes).any():
                continue
            step_s = problem.step_s(candidate, partition)
            if best is None or step_s < best[0]:
                best = (step_s, partition)
    return best
