"""A target cuts the space to what its exporter writes exactly, and the plan is the best of what is left; so do ties."""

from __future__ import annotations

import pytest

from stagewright.formats.exporters import exporter
from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.planning import make_plan
from stagewright.planner.search.brute_force import best_of_all
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.targets import TARGETS, target_jobs
from stagewright.planner.search.verify import verify_certificate
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

MODEL = resolve_model("llama2-7b")


@pytest.mark.parametrize("target", ["megatron-args", "deepspeed"])
@pytest.mark.parametrize("pins", [Pins(), pytest.param(Pins(pp=2), marks=pytest.mark.soak), Pins(tp=2, pp=4)])
def test_a_plan_for_a_target_is_written_without_loss(target: str, pins: Pins) -> None:
    job = TrainingJob(global_batch=32, sequence_length=4096, space=SearchSpace(target=target, pins=pins))
    outcome = make_plan(MODEL, resolve_cluster("a100-sxm-80g:8x1"), job, top=3)
    assert outcome.plan is not None and outcome.plan.job == job
    for plan in (outcome.plan, *(other.plan for other in outcome.alternatives)):
        lost = [loss for loss in exporter(target)(plan, MODEL).losses if loss.status != "exact"]
        assert not lost
    verify_certificate(outcome.plan, MODEL)


def test_the_plan_for_a_target_is_the_exhaustive_optimum_of_its_parts() -> None:
    profile = profile_factory(4, jitter=0.4, activation_bytes=3e7, parameters=2_000_000)
    cluster = cluster_factory(3, memory_bytes=2.2e8)
    space = SearchSpace(target="deepspeed", max_chunks=2, pins=Pins(pp=3))
    job = TrainingJob(global_batch=6, sequence_length=128, precision="fp32", space=space, gap=0.0)
    outcome = make_plan(profile, cluster, job)
    jobs = target_jobs(job)
    assert jobs is not None and len(jobs) == 2
    steps = []
    for part in jobs:
        problem = Problem(profile, cluster, part, 3)
        found = best_of_all(problem, problem.candidates())
        steps += [] if found is None else [found[0]]
    assert outcome.status == "optimal" and outcome.objective_s == pytest.approx(min(steps), rel=1e-9)
    free = make_plan(profile, cluster, job.model_copy(update={"space": space.model_copy(update={"target": None})}))
    assert free.objective_s is not None and free.objective_s < min(steps)


def test_an_unknown_target_names_the_known_ones() -> None:
    job = TrainingJob(global_batch=6, sequence_length=128, space=SearchSpace(target="nonsense"))
    with pytest.raises(InvalidArgument) as error:
        make_plan(profile_factory(4), cluster_factory(2), job)
    assert error.value.hint is not None and all(name in error.value.hint for name in TARGETS)


def test_equal_degrees_are_equal_and_the_best_of_those() -> None:
    profile, cluster = profile_factory(4, jitter=0.4, tensor_degrees=(1, 2)), cluster_factory(4)
    space = SearchSpace(equal=(("dp", "pp"),), schedules=("1f1b", "gpipe"), zero=(0, 1))
    job = TrainingJob(global_batch=8, sequence_length=128, precision="fp32", space=space, gap=0.0)
    outcome = make_plan(profile, cluster, job)
    assert outcome.plan is not None
    assert outcome.plan.stages[0].degrees.dp == outcome.plan.schedule.num_ranks == 2
    pinned = job.model_copy(update={"space": space.model_copy(update={"equal": (), "pins": Pins(dp=2, pp=2)})})
    assert outcome.objective_s == pytest.approx(make_plan(profile, cluster, pinned).objective_s, rel=1e-9)


def test_a_space_that_the_target_cannot_express_says_so_and_what_would_help() -> None:
    space = SearchSpace(target="megatron-args", pins=Pins(tp=2))
    job = TrainingJob(global_batch=16, sequence_length=1024, space=space)
    outcome = make_plan(resolve_model("gpt2"), resolve_cluster("a100-sxm-80g:2x1"), job)
    assert outcome.status == "infeasible" and outcome.diagnosis is not None
    assert outcome.diagnosis.binding == "target" and "50257" in outcome.diagnosis.message
    changes = [item.change for item in outcome.diagnosis.relaxations]
    assert "target megatron-args not required" in changes and "tp not pinned to 2" in changes
