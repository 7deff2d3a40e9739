"""The interval programme bounds every completion from below, and finds a partition exactly when one fits."""

from __future__ import annotations

import sys
from pathlib import Path

from stagewright.planner.search.brute_force import best_completion
from stagewright.planner.search.interval_dp import Ranges, solve_intervals

sys.path.insert(0, str(Path(__file__).parent))

from random_problems import random_problem


def test_its_value_is_at_most_the_best_simulated_step_and_none_when_nothing_fits() -> None:
    checked = 0
    for seed in range(25):
        problem = random_problem(seed, most_layers=5)
        for candidate in problem.candidates():
            if candidate.rule.name not in ("1f1b", "gpipe"):
                continue
            room = problem.capacity_bytes - problem.base_bytes
            ranges = Ranges(problem.costs(candidate.configuration), problem.order(candidate), room, problem.levels)
            overhead_s = problem.profile.action_overhead_s
            found = solve_intervals(ranges, problem.wiring(candidate.configuration), overhead_s=overhead_s)
            oracle = best_completion(problem, candidate)
            assert (found is None) == (oracle is None)
            if found is not None and oracle is not None:
                assert found.bound_s <= oracle[0] * (1 + 1e-9)
                checked += 1
    assert checked >= 10
