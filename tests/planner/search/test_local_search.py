"""Known paths bound every partition of their order, and shaken local optima are no worse than the first."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit

from stagewright.planner.search.brute_force import best_completion
from stagewright.planner.search.completion_tables import path_bound, prepare, scratch_of, swept
from stagewright.planner.search.incumbent import improve, start
from stagewright.planner.search.joint_search import JointSearch
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.local_search import _keep_path, _no_paths

sys.path.insert(0, str(Path(__file__).parent))

from random_problems import random_problem


# For Python, which what they call has no wrapper for.
@njit
def new_scratch(tables):
    return scratch_of(tables)


@njit
def no_paths(tables):
    return _no_paths(tables)


@njit
def prepared(tables, bounds, weight, counts, scratch):
    return prepare(tables, bounds, weight, counts, scratch)


@njit
def bound_by_paths(tables, scratch, counts, ends, known):
    return path_bound(tables, scratch, counts, ends, known)


@njit
def swept_step(tables, scratch):
    return swept(tables, scratch)


@njit
def keep_path(tables, scratch, paths):
    return _keep_path(tables, scratch, paths)


def _candidates(seeds: range):
    for seed in seeds:
        problem = random_problem(seed, most_layers=6)
        search = JointSearch.of(problem, Limits(gap=0.0))
        for index in range(search.space.num_candidates if len(problem.priced) else 0):
            costs = search.costs.of(index)
            if costs is not None and costs.num_stages > 1:
                yield problem, search.space.candidate(index), costs


def test_a_path_of_one_partition_is_no_longer_than_the_step_of_another() -> None:
    rng = np.random.default_rng(0)
    compared = longest = 0
    for _, _, costs in _candidates(range(14)):
        tables = costs.tables
        scratch, paths = new_scratch(tables), no_paths(tables)
        counts = np.zeros((costs.num_stages, costs.runs.num_runs, 3), dtype=np.int64)
        for _ in range(8):
            inner = np.sort(rng.choice(np.arange(1, costs.num_layers), costs.num_stages - 1, replace=False))
            bounds = np.concatenate(([0], inner, [costs.num_layers]))
            if not prepared(tables, bounds, np.ones(costs.num_stages), counts, scratch):
                continue
            known = int(paths.kept[0])
            before_s = bound_by_paths(tables, scratch, paths.counts, paths.ends, known)
            step_s = swept_step(tables, scratch)
            assert known == 0 or before_s <= step_s * (1 + 1e-9)
            keep_path(tables, scratch, paths)
            after_s = bound_by_paths(tables, scratch, paths.counts, paths.ends, known + 1)
            assert after_s == pytest.approx(step_s, rel=1e-9)
            compared += 1
            longest += known > 0 and before_s >= step_s * (1 - 1e-9)
    assert compared >= 60
    assert longest >= compared // 4  # a bound that tells something


def test_shaken_local_optima_are_as_good_as_the_best_partition_more_often() -> None:
    once = shaken = checked = 0
    for problem, candidate, costs in _candidates(range(10, 60)):
        first, oracle = start(costs), best_completion(problem, candidate)
        if first is None or oracle is None:
            continue
        plain, _ = improve(costs, first.bounds)
        walked, _ = improve(costs, first.bounds, most_moves=300)
        assert plain is not None and walked is not None
        assert walked.step_s <= plain.step_s * (1 + 1e-12)
        assert costs.fits(walked.counts)
        checked += 1
        once += plain.step_s <= oracle[0] * (1 + 1e-6)
        shaken += walked.step_s <= oracle[0] * (1 + 1e-6)
    assert checked >= 20
    assert shaken >= max(once, 0.8 * checked)
