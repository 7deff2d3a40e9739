"""Plans whose stages differ equal exhaustive simulation of their declared space, and beat plans that ignore differences."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from stagewright.planner.search.brute_force import best_by_stage
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.pool_search import PoolSearch
from stagewright.planner.search.stage_candidate import StageCandidate

sys.path.insert(0, str(Path(__file__).parent))

from random_mixed_problems import all_candidates, random_mixed_problem


def _exhaustive_step_s(search: PoolSearch) -> float | None:
    """Return the least step of all candidates; one whose average rank alone works as long cannot be shorter."""
    least: float | None = None
    pairs = [(_average_rank_s(candidate), place, candidate) for place, candidate in enumerate(all_candidates(search))]
    for average_s, _, candidate in sorted(pairs, key=lambda pair: pair[:2]):
        if least is not None and average_s >= least:
            break
        found = best_by_stage(candidate)
        if found is not None and (least is None or found[0] < least):
            least = found[0]
    return least


def _average_rank_s(candidate: StageCandidate) -> float:
    """Return the seconds of all layers, each at its fastest stage, over the number of ranks: some rank has as much to do."""
    each = np.min([costs.time_s for costs in candidate.layers], axis=0)
    return float(candidate.num_microbatches * each.sum() / candidate.order.num_ranks)


def _agrees(seed: int, *, most_layers: int = 5) -> bool:
    """Check one problem; return whether it had a plan."""
    problem = random_mixed_problem(seed, most_layers=most_layers)
    limits = Limits(gap=0.0)
    search = PoolSearch(problem, limits, split=problem.job.space.per_stage_degrees)
    oracle_s = _exhaustive_step_s(search)
    bound_s, _ = search.run()
    if oracle_s is None:
        assert search.best is None
        return False
    assert search.best is not None
    assert search.best.step_s == pytest.approx(oracle_s, rel=1e-9)
    assert bound_s == pytest.approx(oracle_s, rel=1e-9)
    plan = search.best.candidate.scored(search.best.partition, "exact")
    assert plan.prediction.step_time_s == pytest.approx(oracle_s, rel=1e-9)
    return True


def test_the_search_over_pools_equals_exhaustive_simulation_on_random_small_problems() -> None:
    with_plan = sum(_agrees(seed, most_layers=4) for seed in range(16))
    assert with_plan >= 8


@pytest.mark.soak
def test_the_search_over_pools_equals_exhaustive_simulation_on_five_hundred_random_small_problems() -> None:
    with_plan = sum(_agrees(seed, most_layers=4) for seed in range(1000, 1500))
    assert with_plan >= 250
