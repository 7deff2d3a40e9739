"""Pins and forbids cut the space, and the plan is the best of what they leave."""

from __future__ import annotations

import pytest

from stagewright.planner.catalog.clusters import resolve_cluster
from stagewright.planner.catalog.models import resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import Forbid, Pins, SearchSpace
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.planning import make_plan
from stagewright.planner.search.brute_force import best_of_all
from stagewright.planner.search.exact import solve
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


def _job(**space: object) -> TrainingJob:
    return TrainingJob(
        global_batch=8,
        sequence_length=128,
        precision="fp32",
        space=SearchSpace.model_validate({"zero": (0, 1), **space}),
    )


def test_a_pinned_plan_keeps_its_pins_and_is_the_best_that_does() -> None:
    profile, cluster = profile_factory(4, jitter=0.3), cluster_factory(4)
    job = _job(pins=Pins(pp=2, dp=2, schedule="1f1b", recompute="full"))
    outcome = make_plan(profile, cluster, job, gap=0.0)
    problem = Problem(profile, cluster, job, 4)
    oracle = best_of_all(problem, problem.candidates())
    assert oracle is not None and outcome.plan is not None
    assert outcome.objective_s == pytest.approx(oracle[0], rel=1e-9)
    assert outcome.plan.schedule.num_ranks == 2 and outcome.plan.stages[0].degrees.dp == 2
    assert {level.value for stage in outcome.plan.stages for level in stage.recompute_levels()} == {"full"}


@pytest.mark.parametrize("name", ["gems", "chimera", "dualpipe"])
def test_a_schedule_of_two_pipelines_has_at_least_two_ranks(name: str) -> None:
    found = make_plan(profile_factory(4, forward_s=1e-3), cluster_factory(2), _job(pins=Pins(schedule=name)))
    assert found.plan is not None
    plans = [found.plan, *(other.plan for other in found.alternatives)]
    assert {plan.schedule.num_ranks for plan in plans} == {2}


def test_a_forbidden_value_is_not_in_the_plan() -> None:
    profile, cluster = profile_factory(4, jitter=0.3), cluster_factory(4)
    free = make_plan(profile, cluster, _job(), gap=0.0)
    assert free.plan is not None and free.plan.stages[0].degrees.dp == 4
    kept = make_plan(profile, cluster, _job(forbids=(Forbid(name="dp"),)), gap=0.0)
    assert kept.plan is not None and kept.plan.stages[0].degrees.dp == 1
    assert kept.objective_s is not None and free.objective_s is not None and kept.objective_s >= free.objective_s


def test_pins_that_need_more_devices_than_there_are_name_both_numbers() -> None:
    with pytest.raises(InvalidArgument, match="8 devices, there are 4"):
        make_plan(profile_factory(4), cluster_factory(4), _job(pins=Pins(dp=4, pp=2)))


def test_what_cannot_fit_names_the_nearest_plan_and_what_it_lacks() -> None:
    outcome = make_plan(profile_factory(4), cluster_factory(2, memory_bytes=4e6), _job())
    assert outcome.status == "infeasible" and outcome.plan is None
    assert outcome.diagnosis is not None and outcome.diagnosis.nearest is not None
    assert outcome.diagnosis.shortfalls and outcome.diagnosis.relaxations
    for item in outcome.diagnosis.shortfalls:
        assert item.short_bytes == pytest.approx(item.needed_bytes - item.available_bytes)
        assert item.items.total == pytest.approx(item.needed_bytes)


def test_a_deadline_that_has_passed_still_brings_a_plan_and_a_bound() -> None:
    cluster = cluster_factory(4)
    problem = Problem(profile_factory(6, jitter=0.3), cluster, _job(), cluster.num_devices)
    outcome = solve(problem, Limits(gap=0.0, deadline_s=0.5, clock=lambda: 1e9))
    assert outcome.status == "feasible" and outcome.termination == "time_limit"
    assert outcome.plan is not None and outcome.objective_s is not None and outcome.bound_s is not None
    assert 0 < outcome.bound_s <= outcome.objective_s
    assert outcome.plan.certificate is not None and outcome.plan.certificate.any_order_bound is not None
    assert outcome.plan.certificate.any_order_bound <= outcome.objective_s


@pytest.mark.parametrize("looks", [0, 4, 8, 12, 16, 24, 40])
def test_a_deadline_that_passes_after_so_many_looks_at_the_clock_brings_a_plan_of_the_largest_case(looks: int) -> None:
    """Whatever part of the space was priced by then, and however many of the fastest guesses do not fit."""
    cluster, seen = resolve_cluster("h100-sxm:8x2048"), iter(range(looks))
    job = TrainingJob(global_batch=2048, sequence_length=8192)
    problem = Problem(resolve_model("llama3.1-405b"), cluster, job, cluster.num_devices)
    limits = Limits(deadline_s=0.5, clock=lambda: 0.0 if next(seen, None) is not None else 1e9)
    outcome = solve(problem, limits)
    assert outcome.plan is not None and outcome.objective_s is not None and outcome.bound_s is not None
    assert 0 < outcome.bound_s <= outcome.objective_s


def test_what_a_deadline_leaves_unpriced_is_bounded_by_its_work_at_the_peaks() -> None:
    job = TrainingJob(global_batch=64, sequence_length=1024)
    cluster = resolve_cluster("a100-sxm-80g:8x1")
    problem = Problem(resolve_model("gpt2"), cluster, job, 8)
    hurried = solve(problem, Limits(deadline_s=0.5, clock=lambda: 1e9))
    assert hurried.plan is not None and hurried.plan.certificate is not None and hurried.bound_s is not None
    assert hurried.plan.certificate.pruned["not priced"] > 0
    proved = solve(Problem(resolve_model("gpt2"), cluster, job, 8), Limits())
    assert proved.objective_s is not None and 0 < hurried.bound_s <= proved.objective_s
