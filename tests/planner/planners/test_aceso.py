"""Aceso: near the optimum of its own cost model, and quick on a thousand layers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planners.aceso import AcesoSearch, even_bounds, shift
from stagewright.planner.planners.range_cuts import least_sum_and_max
from stagewright.planner.planners.stage_table import StageTable, ranges_of
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


def search(forward_s: list[float], ranks: int, batch: int) -> tuple[AcesoSearch, StageTable]:
    space = SearchSpace(schedules=("1f1b",), pins=Pins(pp=ranks, microbatch=1))
    job = TrainingJob(global_batch=batch, sequence_length=128, precision="fp32", space=space)
    problem = Problem(profile_factory(forward_s=forward_s), cluster_factory(ranks, 1), job, ranks)
    return AcesoSearch(problem, Limits(), {}), StageTable(problem, problem.candidates()[0])


@pytest.mark.parametrize("seed", range(12))
def test_the_search_reaches_95_percent_of_the_optimum_of_the_same_cost_model(seed):
    draw = np.random.default_rng(seed)
    ranks = int(draw.choice([2, 4, 8]))
    found, table = search(draw.uniform(0.5e-3, 2.5e-3, 40).tolist(), ranks, 24)
    start = tuple(round(40 * index / ranks) for index in range(ranks + 1))
    end = found.climb((table.configuration, start))
    best = least_sum_and_max(table.time_s[None], [1], ranks, 23.0)
    assert best is not None
    assert best.value * (1 - 1e-9) <= found.estimate(end).value <= best.value / 0.95


def test_a_thousand_layers_take_few_evaluations():
    draw = np.random.default_rng(0)
    found, table = search(draw.uniform(0.5e-3, 2.5e-3, 1000).tolist(), 16, 64)
    start = tuple(round(1000 * index / 16) for index in range(17))
    end = found.climb((table.configuration, start))
    whole = ranges_of(table.costs.time_s)
    slowest = max(whole[first, end] for first, end in pairwise(end[1]))
    assert slowest <= whole[0, -1] / 16 / 0.95
    assert len(found.seen) < 20_000


def test_layers_pass_through_the_stages_between():
    assert shift((0, 4, 6, 8), 0, 2, 1) == (0, 3, 5, 8)
    assert shift((0, 2, 4, 8), 2, 0, 2) == (0, 4, 6, 8)
    assert even_bounds(np.ones(8), 4) in {(0, 2, 4, 6, 8), (0, 3, 5, 7, 8)}
