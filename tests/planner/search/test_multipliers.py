"""Multipliers of one candidate bound the others of its order, and so does the tree that closed it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np

from stagewright.planner.search.closing import Closer
from stagewright.planner.search.multipliers import bound_by, mean_path
from stagewright.planner.search.path_pool import PathPool

sys.path.insert(0, str(Path(__file__).parent))

from random_problems import solved_candidates


def test_mean_paths_of_an_order_bound_all_its_candidates_and_are_near_for_alike_ones() -> None:
    compared = near = 0
    closers: dict[int, Closer] = {}
    for seed, search, _, costs, step_s, ranges in solved_candidates(range(24)):
        closer = closers.setdefault(seed, Closer(search.limits))
        paths = closer.of(costs.order).mean_paths
        if paths:
            bound_s = bound_by(costs, paths, ranges, np.inf)
            assert bound_s <= step_s * (1 + 1e-9)
            compared += 1
            near += bound_s >= 0.9 * step_s
        closer.close(costs, 0.9 * step_s, step_s, ranges)
    assert compared >= 12
    assert near >= compared // 3


def test_a_mean_of_random_paths_is_no_longer_than_the_best_completion() -> None:
    rng = np.random.default_rng(3)
    compared = 0
    for _, _, _, costs, step_s, ranges in solved_candidates(range(30, 38)):
        pool = PathPool(costs.order)
        for _ in range(4):
            seconds, hops = rng.random((3, costs.num_stages)), rng.random(costs.order.num_hops)
            pool.add(costs.order.trace(seconds, hops, rng.random(costs.order.num_ranks))[1])
        path = mean_path(costs, pool, pool.names[: pool.number], rng.random(pool.number))
        assert path is not None
        assert bound_by(costs, [path], ranges, np.inf) <= step_s * (1 + 1e-9)
        compared += 1
    assert compared >= 10
    assert mean_path(costs, pool, pool.names[:0], np.zeros(0)) is None


def test_a_tree_that_closed_a_candidate_closes_it_again_without_probing() -> None:
    again = 0
    for _, search, index, costs, step_s, ranges in solved_candidates((0, 4)):
        closer = Closer(search.limits)
        judge = partial(search.completions.judged, index)
        first = closer.close_whole(costs, 0.0, step_s, step_s, ranges, judge, 200)
        second = closer.close_whole(costs, 0.0, step_s, step_s, ranges, judge, 200)
        if first.reason == "branching" and first.num_nodes > 2:
            assert second.reason == "branching"
            assert second.num_nodes <= first.num_nodes // 2
            again += 1
    assert again >= 9
