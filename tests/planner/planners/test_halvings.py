"""HyPar and Tofu on the common problem: what they send, and which products they end at."""

from __future__ import annotations

import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.planners.hypar import sent_elements
from stagewright.planner.planners.tofu import halvings, sent_bytes
from stagewright.planner.planning import make_plan
from stagewright.planner.search.problem import Problem
from stagewright.planner.sharding.hypar import ChainLayer, hypar


def test_equal_choices_send_what_hypar_counts_where_it_chooses_alike():
    layers = [ChainLayer(f"fc{i}", 4096.0**2, 32 * 4096.0, 32 * 4096.0) for i in range(3)]
    found = hypar(layers, 4)
    assert found.levels == (("mp",) * 3,) * 2
    assert sent_elements(layers, ["mp", "mp"]) == pytest.approx(found.sent_elements)
    assert sent_elements(layers, ["dp", "dp"]) > sent_elements(layers, ["dp", "mp"]) > found.sent_elements


def test_large_fully_connected_layers_are_model_parallel_and_convolutions_data_parallel():
    cluster = resolve_cluster("v100:4x1")
    job = TrainingJob(global_batch=64, sequence_length=1, precision="fp32")
    plan = make_plan(resolve_model("resnet-50"), cluster, job, planner="hypar").plan
    assert plan is not None
    assert (plan.stages[0].degrees.dp, plan.stages[0].degrees.tp) == (4, 1)
    layers = [ChainLayer("fc", 4096.0**2, 32 * 4096.0, 32 * 4096.0)] * 2
    assert sent_elements(layers, ["mp"]) < sent_elements(layers, ["dp"])


def test_halving_goes_where_fewer_bytes_are_sent_and_stays_within_what_is_legal():
    every = [(1 << a, 8 >> a) for a in range(4)]
    assert halvings(8, lambda product: product[1], within=every) == (8, 1)
    assert halvings(8, lambda product: product[0], within=every) == (1, 8)
    assert halvings(8, lambda product: product[0], within=[(4, 2), (8, 1)]) == (4, 2)
    assert halvings(8, lambda product: abs(product[0] - product[1]), within=every) in ((4, 2), (2, 4))


def test_tofu_divides_samples_of_a_small_model_and_sends_least_of_all_products():
    problem = Problem(
        resolve_model("gpt2"),
        resolve_cluster("a100-sxm-80g:8x1"),
        TrainingJob(global_batch=64, sequence_length=1024),
        8,
    )
    outcome = make_plan(problem.profile, problem.cluster, problem.job, planner="tofu")
    assert outcome.plan is not None
    degrees = outcome.plan.stages[0].degrees
    assert (degrees.dp, degrees.tp, degrees.zero) == (8, 1, 3)
    assert outcome.own_objective == min(sent_bytes(problem, (8 // tp, tp)) for tp in (1, 2, 4))
