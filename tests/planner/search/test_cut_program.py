"""A program has the same optimum whenever it gets to know its paths, and few of them bind."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.cut_program import CutProgram, Form
from stagewright.planner.search.joint_search import JointSearch
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.order import Cut

sys.path.insert(0, str(Path(__file__).parent))

from random_problems import random_problem


def _random_paths(costs: CandidateCosts, number: int, seed: int) -> list[Cut]:
    """Critical paths of an order at random costs."""
    draw, order = np.random.default_rng(seed), costs.order
    return [
        order.trace(
            draw.exponential(size=(3, order.num_stages)),
            draw.exponential(0.1, size=order.num_hops),
            draw.exponential(0.1, size=order.num_ranks),
        )[1]
        for _ in range(number)
    ]


@pytest.mark.parametrize("form", ["light", "full", "whole"])
def test_paths_bind_the_same_whether_known_at_once_or_one_after_the_other(form: Form) -> None:
    compared = fewer = 0
    for seed in range(24):
        search = JointSearch(random_problem(seed, most_layers=6), Limits(gap=0.0))
        for index in range(0, search.num_candidates if len(search.problem.priced) else 0, 7):
            costs = search.costs(index)
            if costs is None or costs.num_stages < 2:
                continue
            paths = _random_paths(costs, 96, seed)
            at_once, in_turn = (CutProgram(costs, form=form, target_s=np.inf) for _ in range(2))
            at_once.add(paths)
            point = at_once.solve()
            for first in range(0, len(paths), 16):
                in_turn.add(paths[first : first + 16])
                again = in_turn.solve()
            if point is None:
                assert again is None
                continue
            assert again is not None
            assert point.bound_s == pytest.approx(again.bound_s, rel=1e-6)
            rows, constants = at_once.rows(paths)
            assert (rows @ at_once.values >= constants - 1e-6 * at_once.values[0]).all()
            compared += 1
            fewer += len(at_once.carrying()) < len(paths) / 2
    assert compared >= 6 and fewer >= compared / 2
