"""Plans whose stages differ equal exhaustive simulation of their declared space, and beat plans that ignore differences."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stagewright.planner.search.brute_force import best_by_stage
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.pool_search import PoolSearch

sys.path.insert(0, str(Path(__file__).parent))

from random_mixed_problems import all_candidates, random_mixed_problem


def _agrees(seed: int) -> bool:
    """Check one problem; return whether it had a plan."""
    problem = random_mixed_problem(seed)
    limits = Limits(gap=0.0)
    search = PoolSearch(problem, limits, split=problem.job.space.per_stage_degrees)
    oracle_s = min(
        (found[0] for found in map(best_by_stage, all_candidates(search)) if found is not None), default=None
    )
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
    with_plan = sum(_agrees(seed) for seed in range(16))
    assert with_plan >= 8


@pytest.mark.soak
def test_the_search_over_pools_equals_exhaustive_simulation_on_five_hundred_random_small_problems() -> None:
    with_plan = sum(_agrees(seed) for seed in range(1000, 1500))
    assert with_plan >= 250
