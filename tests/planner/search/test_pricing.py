"""The space priced at once costs what one configuration at a time costs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.search.joint_search import JointSearch
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Partition, Problem

sys.path.insert(0, str(Path(__file__).parent))

from random_problems import random_problem


def _check_rows(problem: Problem, draw: np.random.Generator, count: int) -> None:
    priced, classes = problem.priced, problem.classes
    if not len(priced):
        return
    for row in draw.integers(len(priced), size=count).tolist():
        costs = problem.costs(priced.configuration(row))
        expected = {
            "forward_s": costs.forward_s,
            "input_grad_s": costs.input_grad_s,
            "weight_grad_s": costs.weight_grad_s,
            "recompute_s": costs.recompute_s,
            "kept_bytes": costs.kept_bytes,
            "late_bytes": costs.late_bytes,
            "workspace_bytes": costs.workspace_bytes,
            "split_workspace_bytes": costs.split_workspace_bytes,
            "state_bytes": costs.static_bytes,
            "step_s": costs.step_s,
            "cut_bytes": costs.cut_bytes[:-1],
        }
        for name, value in expected.items():
            got = getattr(priced, name)[row][..., classes.of_layer]
            np.testing.assert_allclose(got, value, rtol=1e-9, err_msg=f"{name} of {priced.configuration(row)}")
        assert priced.latency_s[row] == pytest.approx(costs.stage_latency_s)


def test_rows_equal_layer_costs_on_measured_chains() -> None:
    draw = np.random.default_rng(1)
    for seed in range(60):
        _check_rows(random_problem(seed), draw, 6)


@pytest.mark.parametrize(
    ("model", "cluster"),
    [("llama2-7b", "a100-sxm-80g:8x2"), ("mixtral-8x7b", "h100-sxm:8x4"), ("gpt2", "a100-sxm-80g:4x1")],
)
def test_rows_equal_layer_costs_on_analytic_models(model: str, cluster: str) -> None:
    machines = resolve_cluster(cluster)
    job = TrainingJob(global_batch=64, sequence_length=1024)
    problem = Problem(resolve_model(model), machines, job, machines.num_devices)
    _check_rows(problem, np.random.default_rng(2), 60)


def test_a_completed_candidate_costs_what_its_plan_costs() -> None:
    draw = np.random.default_rng(3)
    checked = 0
    for seed in range(40):
        problem = random_problem(seed)
        search = JointSearch.of(problem, Limits())
        if not len(problem.priced) or not search.space.num_candidates:
            continue
        for index in draw.integers(search.space.num_candidates, size=4).tolist():
            costs = search.costs.of(index)
            if costs is None:
                continue
            inner = np.sort(draw.choice(np.arange(1, costs.num_layers), costs.num_stages - 1, replace=False))
            bounds = (0, *inner.tolist(), costs.num_layers)
            level = int(draw.choice(problem.levels))
            counts = np.zeros((costs.num_stages, costs.runs.num_runs, 3), dtype=np.int64)
            counts[:, :, level] = costs.layers_of(bounds)
            partition = Partition(bounds, costs.levels_of(counts, bounds))
            pipeline = problem.pipeline(search.space.candidate(index), partition)
            np.testing.assert_allclose(costs.stage_costs(counts), pipeline.costs, rtol=1e-9)
            np.testing.assert_allclose(costs.hop_seconds(bounds), pipeline.hop_s, rtol=1e-9)
            np.testing.assert_allclose(costs.tails(counts.sum(axis=2), bounds), pipeline.tail_s, rtol=1e-8, atol=1e-12)
            np.testing.assert_allclose(costs.peak_bytes(counts) + problem.base_bytes, pipeline.peak_bytes, rtol=1e-9)
            checked += 1
    assert checked > 60
