"""Programs over cuts never deny a completion that exists, and whole layers prove more than fractions do."""

from __future__ import annotations

import os
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagewright.planner.catalog.clusters import resolve_cluster
from stagewright.planner.catalog.models import resolve_model
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.lanes import Lanes
from stagewright.planner.search.branching import Split
from stagewright.planner.search.closing import Closer
from stagewright.planner.search.joint_search import JointSearch
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem

sys.path.insert(0, str(Path(__file__).parent))

from random_problems import random_problem, solved_candidates


def _check_programs(seeds: range) -> tuple[int, int, int]:
    """Check the candidates of some problems; return how many, how many were proved to 1 %, and before whole layers."""
    checked = proved = before = 0
    closers: dict[int, Closer] = {}
    for seed, search, index, costs, step_s, ranges in solved_candidates(seeds):
        closer = closers.setdefault(seed, Closer(search.limits))
        target_s = step_s * (1.0 + 1e-6)
        linear = closer.close(costs, target_s, step_s, ranges)
        assert linear.bound_s <= step_s * (1.0 + 1e-6), (seed, search.space.candidate(index).summary)
        judge = partial(search.completions.judged, index)
        whole = closer.close_whole(costs, linear.bound_s, target_s, step_s, ranges, judge)
        assert whole.bound_s <= step_s * (1.0 + 1e-6), (seed, search.space.candidate(index).summary)
        for completion in (linear.completion, whole.completion):
            assert completion is None or costs.fits(completion.counts)
            assert completion is None or judge(completion).step_s >= step_s * (1.0 - 1e-9)
        checked += 1
        before += linear.bound_s >= step_s / 1.01
        proved += whole.bound_s >= step_s / 1.01
    return checked, proved, before


def test_programs_bound_the_best_simulated_completion_and_whole_layers_prove_more() -> None:
    checked, proved, before = _check_programs(range(10))
    assert checked >= 20
    assert proved >= 1.4 * before


def test_branching_goes_on_where_it_ended() -> None:
    """A few nodes at a time, with what is kept of the candidate carried through a pickle, it proves what it proves at once."""
    resumed = closed = 0
    for seed, search, index, costs, step_s, ranges in solved_candidates(range(12)):
        target_s = step_s * (1.0 - 1e-6)  # no completion is below it
        judge = partial(search.completions.judged, index)
        whole = Closer(search.limits).close_whole(costs, 0.0, target_s, step_s, ranges, judge)
        if whole.reason == "open" or whole.num_nodes < 6:
            continue
        by_nodes, parts = Closer(search.limits), []
        while not parts or parts[-1].reason == "open":
            parts.append(by_nodes.close_whole(costs, 0.0, target_s, step_s, ranges, judge, 4, index))
            assert len(parts) <= 500, (seed, search.space.candidate(index).summary)
            learned = by_nodes.of(costs.order)
            learned.trees, learned.left = pickle.loads(pickle.dumps((learned.trees, learned.left)))
        assert parts[-1].bound_s >= target_s
        assert all(part.bound_s <= step_s for part in parts)
        assert not learned.left
        resumed += len(parts) - 1
        closed += 1
    assert closed >= 10
    assert resumed >= 3 * closed


def test_answers_and_counters_do_not_depend_on_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, fork, forks = 0, os.fork, []

    def counted_fork() -> int:
        forks.append(fork())
        return forks[-1]

    monkeypatch.setattr("stagewright.planner.lanes.FORKS_AFTER_S", -1.0)
    monkeypatch.setattr(os, "fork", counted_fork)
    for seed in range(16):
        answers = []
        for cores in (1, 3):
            monkeypatch.setattr("stagewright.planner.lanes.num_cores", lambda cores=cores: cores)
            search = JointSearch.of(random_problem(seed, most_layers=6), Limits(gap=0.0))
            bound_s, _ = search.run()
            found, work = search.completions, search.work
            best = None if found.best is None else found.best.completion.bounds
            answers.append((bound_s, found.incumbent_s, best, work.evaluated, work.simulated, work.pruned))
        assert answers[0] == answers[1], seed
        counted += answers[0][3]
    assert counted >= 6
    assert len(forks) >= 6


def test_answers_stay_where_orders_move_between_cores_with_all_that_is_known_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    move, moves, answers = Lanes._moved, [], []

    def counted_move(lanes: Lanes[Any, Any], *how: Any) -> bool:
        moves.append(move(lanes, *how))
        return moves[-1]

    monkeypatch.setattr("stagewright.planner.lanes.MOVES_FOR_S", 1e-9)
    monkeypatch.setattr(Lanes, "_moved", counted_move)
    cluster, job = resolve_cluster("v100-sxm-32g:2x8"), TrainingJob(global_batch=64, sequence_length=1024)
    for cores in (1, 3):
        monkeypatch.setattr("stagewright.planner.lanes.num_cores", lambda cores=cores: cores)
        search = JointSearch.of(Problem(resolve_model("gpt2-xl"), cluster, job, 16), Limits(gap=0.0))
        bound_s, _ = search.run()
        work = search.work
        answers.append((bound_s, search.completions.incumbent_s, work.evaluated, work.simulated, work.pruned))
    assert answers[0] == answers[1]
    assert moves
    assert all(moves)


def test_a_tree_of_splits_travels_however_deep_it_is() -> None:
    tree = Split()
    leaves = [tree]
    for depth in range(5000):
        leaf = leaves.pop()
        leaf.into(((depth, 0.0, 1.0),), ((depth, 2.0, np.inf), (0, 1.0, 1.0)))
        leaves += [split for _, split in leaf.parts]
    left, right = [tree], [pickle.loads(pickle.dumps(tree))]
    for one, other in zip(left, right, strict=True):  # both grow
        assert [limits for limits, _ in one.parts] == [limits for limits, _ in other.parts]
        left += [split for _, split in one.parts]
        right += [split for _, split in other.parts]
    assert len(left) == 10001


@pytest.mark.soak
def test_programs_bound_the_best_simulated_completion_of_two_hundred_problems() -> None:
    checked, proved, before = _check_programs(range(3000, 3200))
    assert checked >= 400
    assert proved >= 1.3 * before  # the linear programs know whole layers' recomputation, and prove much alone
