"""Random plans: candidates, partitions and recomputation drawn uniformly, the best of them kept. A baseline.

Deterministic by seed. Proves nothing.
"""

from __future__ import annotations

from random import Random

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import candidates_outcome
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Candidate, Partition, Problem

NUM_DRAWS = 300


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the best of a fixed number of random plans."""
    return sample(problem, limits, num_draws=NUM_DRAWS, seed=0)


def sample(problem: Problem, limits: Limits, *, num_draws: int, seed: int) -> PlanOutcome:
    """Return the best of `num_draws` plans drawn with `seed`."""
    generator = Random(seed)
    candidates = problem.candidates()
    choices: list[tuple[Candidate, Partition]] = []
    for _ in range(num_draws if candidates else 0):
        candidate = generator.choice(candidates)
        choices.append((candidate, random_partition(problem, candidate, generator)))
        if limits.reached() is not None:
            break
    return candidates_outcome(problem, limits, choices, PLANNER.name, num_candidates=len(candidates))


def random_partition(problem: Problem, candidate: Candidate, generator: Random) -> Partition:
    """Return a partition drawn uniformly, with one recomputation level for all layers."""
    layers = problem.profile.num_layers
    stages = candidate.configuration.num_ranks * candidate.num_chunks
    inner = sorted(generator.sample(range(1, layers), stages - 1))
    return Partition((0, *inner, layers), (generator.choice(problem.levels),) * layers)


PLANNER = NamedPlanner("random", "uniform sampling, a baseline", solve)
