"""Configurations that large trainings published, and the rules of thumb that the planner finds by itself."""

from __future__ import annotations

import itertools

import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import Degrees, Recompute, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.documents.plan import RecomputeRun, StagePlan
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import evaluate


def test_bloom_fits_384_a100_as_it_was_trained():
    """Le Scao et al. 2022: tp 4, pp 12, dp 8, ZeRO-1, full recomputation, microbatch 2, batch 2,048, five layers at the ends.

    The paper reports 150 to 156 TFLOP/s a device, recomputation counted.
    """
    profile, cluster = resolve_model("bloom-176b"), resolve_cluster("a100-sxm-80g:8x48")
    job = TrainingJob(global_batch=2048, sequence_length=2048)
    degrees = Degrees(tp=4, dp=8, zero=1, vocab_parallel=True)
    plan = even_plan(profile, cluster, job, Choice(degrees, 12, 1, 2, "1f1b", Recompute.FULL))
    bounds = [0, *range(6, 67, 6), profile.num_layers]
    stages = tuple(
        StagePlan(layers=ends, degrees=degrees, recompute=(RecomputeRun(level="full", count=ends[1] - ends[0]),))
        for ends in itertools.pairwise(bounds)
    )
    plan = plan.model_copy(update={"stages": stages})
    assert plan.num_devices == 384
    prediction = evaluate(plan, profile).prediction
    assert max(prediction.peak_memory_bytes) < 80e9
    assert prediction.hfu * 312 == pytest.approx(153, rel=0.25)


@pytest.fixture(scope="module")
def small_plan():
    """A 13B model on two nodes: the planner is free to place every axis."""
    job = TrainingJob(global_batch=64, sequence_length=4096, space=SearchSpace(pins=Pins(pp=2), schedules=("1f1b",)))
    outcome = make_plan(resolve_model("llama2-13b"), resolve_cluster("a100-sxm-80g:8x2"), job, gap=0.05)
    assert outcome.plan is not None
    return outcome.plan


def test_a_plan_names_all_five_dimensions_of_mindspores_auto_parallel(small_plan):
    """PanGu-alpha (Zeng et al., 2021): data, operator-level, pipeline and optimizer parallelism, rematerialisation."""
    stage = small_plan.stages[0]
    assert small_plan.schedule.num_ranks == 2
    assert {"dp", "tp", "zero"} <= set(type(stage.degrees).model_fields)
    assert small_plan.num_devices == 2 * stage.degrees.dp * stage.degrees.tp * stage.degrees.cp
    assert all(len(item.recompute_levels()) == item.num_layers for item in small_plan.stages)


def test_tensor_parallel_groups_stay_inside_a_node_without_being_told():
    """Narayanan et al., SC'21, takeaway 1, with tensor degree 8 pinned and its place left free."""
    job = TrainingJob(
        global_batch=64, sequence_length=4096, space=SearchSpace(pins=Pins(tp=8), schedules=("1f1b",), zero=(0, 1))
    )
    outcome = make_plan(resolve_model("llama2-13b"), resolve_cluster("a100-sxm-80g:8x2"), job, gap=0.05)
    assert outcome.plan is not None
    for ranks in outcome.plan.mapping.pipeline_ranks:
        for first in range(0, len(ranks), 8):
            assert len({rank // 8 for rank in ranks[first : first + 8]}) == 1
