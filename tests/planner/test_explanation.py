"""`explain` accounts for every second of a step, names what binds, and answers why not another choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stagewright.cli.main import run
from stagewright.planner.documents import Cluster, ModelProfile, Plan, Recompute, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.explanation import Searches, explain, path_shares
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import evaluate
from stagewright.planner.search.brute_force import best_of_all
from stagewright.planner.search.problem import Problem
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


def _question(memory_bytes: float) -> tuple[ModelProfile, Cluster, TrainingJob]:
    profile = profile_factory(6, jitter=0.3, parameters=4_000_000, activation_bytes=6e6, step_overhead_s=5e-4)
    cluster = cluster_factory(2, 2, memory_bytes=memory_bytes, node_bytes_per_s=2e9)
    space = SearchSpace(schedules=("1f1b", "gpipe", "zb-h1"), zero=(0, 1), recompute=tuple(Recompute), max_chunks=2)
    job = TrainingJob(global_batch=8, sequence_length=128, precision="fp32", space=space, gap=0.0)
    return profile, cluster, job


def _plan(memory_bytes: float) -> tuple[Plan, ModelProfile]:
    profile, cluster, job = _question(memory_bytes)
    outcome = make_plan(profile, cluster, job)
    assert outcome.plan is not None
    return outcome.plan, profile


@pytest.mark.parametrize("pins", [Pins(), Pins(pp=4), Pins(pp=2, schedule="zb-h1"), Pins(pp=4, schedule="gpipe")])
def test_the_parts_of_a_step_sum_to_it_and_its_communication_is_gone_on_free_links(pins: Pins) -> None:
    profile, cluster, job = _question(1e9)
    job = job.model_copy(update={"space": job.space.model_copy(update={"pins": pins})})
    plan = make_plan(profile, cluster, job).plan
    assert plan is not None
    evaluation = evaluate(plan, profile)
    shares, on_path = path_shares(evaluation, profile)
    assert sum(shares.model_dump().values()) == pytest.approx(evaluation.prediction.step_time_s, rel=1e-12)
    assert all(value >= 0 for value in shares.model_dump().values())
    assert len(on_path) == plan.schedule.num_ranks
    if plan.schedule.num_ranks == 1:
        assert shares.bubble_s == 0 and shares.communication_s == 0


def test_memory_binds_exactly_when_more_of_it_would_shorten_the_step() -> None:
    tight, profile = _plan(1.6e8)
    found = explain(tight, profile)
    free, _ = _plan(1e9)
    assert free.prediction.step_time_s < tight.prediction.step_time_s
    assert found.binding.kind == "memory"
    assert found.binding.step_time_s == pytest.approx(free.prediction.step_time_s, rel=1e-9)
    assert found.binding.pipeline_rank == max(
        range(len(found.ranks)), key=lambda rank: tight.prediction.peak_memory_bytes[rank]
    )
    assert explain(free, profile).binding.kind != "memory"


def test_why_not_is_the_exhaustive_optimum_under_the_pins_or_the_bytes_it_lacks() -> None:
    plan, profile = _plan(1.6e8)
    found = explain(plan, profile, why_not=Pins(pp=4, tp=1), searches=Searches(runners_up=0))
    assert found.why_not is not None and found.why_not.plan is not None and found.why_not.slower is not None
    pinned = plan.job.model_copy(update={"space": plan.job.space.model_copy(update={"pins": Pins(pp=4, tp=1)})})
    problem = Problem(profile, plan.cluster, pinned, 4)
    oracle = best_of_all(problem, problem.candidates())
    assert oracle is not None
    assert found.why_not.step_time_s == pytest.approx(oracle[0], rel=1e-9)
    assert found.why_not.slower == pytest.approx(oracle[0] / plan.prediction.step_time_s - 1.0, rel=1e-6)
    numbers = {row.name: (row.plan, row.other) for row in found.why_not.comparison}
    assert numbers["step_time_s"][1] == pytest.approx(oracle[0])
    refused = explain(plan, profile, why_not=Pins(pp=1, zero=0, recompute="none"), searches=Searches(runners_up=0))
    assert refused.why_not is not None and refused.why_not.status == "infeasible"
    assert refused.why_not.diagnosis is not None and refused.why_not.diagnosis.shortfalls[0].short_bytes > 0


def test_runners_up_are_other_plans_none_faster_and_in_order() -> None:
    plan, profile = _plan(1e9)
    found = explain(plan, profile, searches=Searches(runners_up=4))
    steps = [other.step_time_s for other in found.runners_up]
    assert len(steps) == 4 and steps == sorted(steps)
    assert all(step >= plan.prediction.step_time_s * (1 - 1e-9) for step in steps)
    assert found.summary not in [other.summary for other in found.runners_up]


def test_a_plan_of_another_objective_is_explained_by_its_step() -> None:
    profile, cluster, job = _question(1e9)
    plan = make_plan(profile, cluster, job.model_copy(update={"objective": "min-max-memory"})).plan
    assert plan is not None
    found = explain(plan, profile, searches=Searches(runners_up=2))
    assert found.bound_s is None and found.step_time_s == plan.prediction.step_time_s
    assert all(other.step_time_s < found.step_time_s for other in found.runners_up)


def test_the_command_prints_the_explanation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, profile = _plan(1.6e8)
    plan.save(tmp_path / "plan.json")
    profile.save(tmp_path / "profile.json")
    assert run(["explain", str(tmp_path / "plan.json"), "--why-not", "pp=4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["binding"]["kind"] == "memory" and document["why_not"]["pins"] == ["pp=4"]
    assert run(["explain", str(tmp_path / "plan.json"), "--why-not", "pp=4"]) == 0
    text = capsys.readouterr().out
    assert "binding: memory" in text and "why not pp=4" in text
    assert run(["explain", str(tmp_path / "plan.json"), "--why-not", "nonsense=4", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["field"] == "why-not"
