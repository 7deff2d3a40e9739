"""A program that holds few of the paths it knows has the optimum of one that holds all."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.cut_program import NUM_HELD, CutProgram, Form
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
def test_paths_that_are_only_known_bind_as_rows_do(form: Form) -> None:
    compared = fewer = 0
    for seed in range(24):
        search = JointSearch(random_problem(seed, most_layers=6), Limits(gap=0.0))
        for index in range(0, search.num_candidates if len(search.problem.priced) else 0, 7):
            costs = search.costs(index)
            if costs is None or costs.num_stages < 2:
                continue
            paths = _random_paths(costs, 2 * NUM_HELD, seed)
            few, every = CutProgram(costs, form=form), CutProgram(costs, form=form)
            few.know(paths)
            every.add(paths)
            points = few.solve(), every.solve()
            if points[1] is None:
                assert points[0] is None
                continue
            assert points[0] is not None
            assert points[0].bound_s == pytest.approx(points[1].bound_s, rel=1e-6)
            compared += 1
            fewer += len(few.cuts) < len(every.cuts) == 2 * NUM_HELD
            few.drop(~few.carrying())
            again = few.solve()
            assert again is not None and again.bound_s == pytest.approx(points[1].bound_s, rel=1e-6)
    assert compared >= 6 and fewer >= compared / 2
