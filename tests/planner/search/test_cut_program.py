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
from stagewright.planner.search.path_pool import PathPool
from stagewright.planner.search.path_rows import Rules

sys.path.insert(0, str(Path(__file__).parent))

from random_problems import random_problem

_SOLVED = Rules(rounds=0, smoothing=0.0, stops_below=False, near=0.0, little=0.0)
_TRACED = Rules(rounds=8, smoothing=0.5, stops_below=False, near=0.0, little=0.0)


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


@pytest.mark.parametrize("form", ["light", "whole"])
def test_paths_bind_the_same_whether_known_at_once_or_one_after_the_other(form: Form) -> None:
    compared = fewer = rose = 0
    for seed in range(24):
        search = JointSearch.of(random_problem(seed, most_layers=6), Limits(gap=0.0))
        for index in range(0, search.space.num_candidates if len(search.space.problem.priced) else 0, 7):
            costs = search.costs.of(index)
            if costs is None or costs.num_stages < 2:
                continue
            paths = _random_paths(costs, 96, seed)
            pools = PathPool(costs.order), PathPool(costs.order)
            for path in paths:
                pools[0].add(path)
            at_once, in_turn = (CutProgram(costs, pool, form=form, target_s=np.inf) for pool in pools)
            bound_s = at_once.improve(_SOLVED)
            for place, path in enumerate(paths):
                in_turn.add(path)
                again_s = in_turn.improve(_SOLVED) if place % 16 == 15 else 0.0
            if np.isinf(bound_s):
                assert np.isinf(again_s)
                continue
            assert bound_s == pytest.approx(again_s, rel=1e-6)
            point = at_once.point(bound_s)
            times = costs.stage_costs(point.counts)  # type: ignore[arg-type]
            tails = costs.slots.held @ (point.layers @ costs.runs.step_s + costs.stage_latency_s)
            for path in paths if form != "light" and costs.order.num_replicas == 1 else []:
                assert path.value(times, costs.least_hop_s, tails) <= bound_s * (1 + 1e-6) - costs.step_overhead_s
            rose += at_once.improve(_TRACED) > bound_s * (1 + 1e-6)
            compared += 1
            fewer += len(in_turn.carrying()) < len(paths) / 2
    assert compared >= 6 and fewer >= compared / 2 and rose >= 1


@pytest.mark.parametrize("form", ["light", "whole"])
def test_a_point_of_a_solver_that_gave_up_is_still_within_the_model(form: Form) -> None:
    searches = [JointSearch.of(random_problem(seed, most_layers=6), Limits(gap=0.0)) for seed in range(8)]
    found = [each.costs.of(index) for each in searches for index in range(each.space.num_candidates)]
    costs = next(each for each in found if each is not None and each.num_stages > 1)
    program = CutProgram(costs, PathPool(costs.order), form=form, target_s=np.inf)
    for value in (1e18, -1e18, np.inf, np.nan):
        program.inner = np.full(program.num_columns, value)
        point = program.inner_point()
        assert (point.layers >= 0.0).all() and (point.layers <= costs.runs.length).all()
        assert (point.raised >= 0.0).all() and (point.raised <= costs.runs.length[:, None]).all()
