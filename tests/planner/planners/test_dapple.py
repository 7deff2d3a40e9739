"""DAPPLE: the pivot latency, its bias, and the three placement policies on two machines of four devices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stagewright.planner.planners.dapple import (
    POLICIES,
    DappleProblem,
    PlacedStage,
    dapple_pipeline,
    equal_stages,
    pivot_latency_s,
    take,
)
from stagewright.planner.planners.stage_table import ranges_of
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.search.brute_force import all_partitions
from stagewright.planner.simulation.simulate import StageCosts, simulate


def chain(machines=(4, 4), inside=10.0, across=1.0, *, seed=0, layers=5, weight=1.0, boundary=1.0, microbatches=8):
    draw = np.random.default_rng(seed)
    forward = draw.uniform(0.5, 1.5, layers)
    return DappleProblem(
        forward,
        2 * forward,
        weight * draw.uniform(0.5, 1.5, layers),
        boundary * draw.uniform(0.5, 1.5, layers - 1),
        machines,
        microbatches,
        inside,
        across,
    )


def test_equal_stages_take_33_as_simulated():
    ones = np.ones(4)
    value, pivot = pivot_latency_s(ones, 2 * ones, np.zeros(4), 8)
    assert (value, pivot) == (33.0, 3)
    schedule = generate("1f1b", ScheduleRequest(4, 8))
    assert simulate(schedule, StageCosts(ones, ones, ones, *np.zeros((3, 4)))).makespan_s == 33.0


def test_the_latency_is_0_to_22_percent_below_simulated_1f1b_on_300_random_pipelines():
    draw, bias = np.random.default_rng(0), []
    for _ in range(300):
        stages = int(draw.integers(4, 9))
        forward = draw.uniform(0.5, 1.5, stages)
        latency, _ = pivot_latency_s(forward, 2 * forward, np.zeros(stages), 2 * stages)
        schedule = generate("1f1b", ScheduleRequest(stages, 2 * stages))
        simulated = simulate(schedule, StageCosts(forward, forward, forward, *np.zeros((3, stages)))).makespan_s
        bias.append(1 - latency / simulated)
    assert min(bias) >= -1e-12
    assert max(bias) <= 0.22
    assert 0.01 <= np.mean(bias) <= 0.06


def test_the_policies_take_devices_as_the_paper_draws_them():
    machines, used = (4, 4), (2, 0)
    assert take(machines, used, 3, "fresh") == (0, 3)
    assert take(machines, used, 3, "append") == (2, 1)
    assert take(machines, used, 2, "scatter") == (2, 0)
    assert take(machines, (0, 0), 4, "scatter") == (2, 2)
    assert take(machines, (0, 0), 4, "fresh") == (4, 0)
    assert take(machines, (4, 3), 2, "fresh") is None


def test_all_policies_are_searched_and_each_alone_is_no_better():
    problem = chain()
    best = dapple_pipeline(problem)
    alone = {policy: dapple_pipeline(problem, policies=[policy]).latency_s for policy in POLICIES}
    assert best.latency_s <= min(alone.values()) * (1 + 1e-12)
    assert sum(stage.num_devices for stage in best.stages) == 8
    assert best.latency_s == problem.latency_s(best.stages)


def test_the_plan_depends_on_the_policy_where_links_inside_a_machine_are_ten_times_faster():
    # heavy weights: at 10:1 an all-reduce must stay inside a machine, with equal links scattering loses nothing
    fast, level = (chain(weight=20.0, boundary=0.1, inside=rate) for rate in (10.0, 1.0))
    found = {policy: dapple_pipeline(fast, policies=[policy]) for policy in POLICIES}
    assert found["fresh"].latency_s < 0.9 * found["scatter"].latency_s
    assert [stage.allocation for stage in found["fresh"].stages] != [
        stage.allocation for stage in found["scatter"].stages
    ]
    even = {policy: dapple_pipeline(level, policies=[policy]).latency_s for policy in POLICIES}
    assert even["scatter"] <= even["fresh"]


@pytest.mark.parametrize("seed", range(6))
def test_the_recurrence_is_near_the_best_of_all_pipelines_and_never_below(seed):
    problem = chain((2, 2), seed=seed, layers=4)
    best = np.inf
    for stages in range(1, 5):
        for bounds in all_partitions(4, stages):
            for sizes in itertools.product(itertools.product(range(3), repeat=2), repeat=stages):
                if any(sum(size) == 0 for size in sizes) or tuple(map(sum, zip(*sizes, strict=True))) != (2, 2):
                    continue
                placed = [PlacedStage(bounds[s], bounds[s + 1], sizes[s], "any") for s in range(stages)]
                best = min(best, problem.latency_s(placed))
    found = dapple_pipeline(problem).latency_s
    assert best * (1 - 1e-12) <= found <= 1.1 * best


@pytest.mark.parametrize("seed", range(4))
def test_equal_stages_are_near_the_best_cut(seed):
    forward = np.random.default_rng(seed).uniform(0.5, 1.5, 8)
    tables = [ranges_of(forward), ranges_of(2 * forward), ranges_of(np.full(8, 0.3))]
    hop = np.full(9, 0.05)
    value, bounds = equal_stages(*tables, hop, 3, 6)

    def latency(cut):
        rows = [[table[a, b] for a, b in itertools.pairwise(cut)] for table in tables]
        spread = [np.insert(row, [1, 2], fill) for row, fill in zip(rows, (0.05, 0.05, 0.0), strict=True)]
        return pivot_latency_s(*spread, 6)[0]

    values = [latency(cut) for cut in all_partitions(8, 3)]
    assert latency(bounds.tolist()) == pytest.approx(value, rel=1e-12)
    assert min(values) * (1 - 1e-12) <= value <= 1.1 * min(values)
