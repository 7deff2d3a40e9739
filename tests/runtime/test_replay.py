"""A rank that is replayed alone takes the memory it takes among its peers, and the simulator composes the step."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from pathlib import Path

from runtime_cases import Case, prepare
from runtime_documents import plan_of, profile_of
from runtime_models import TinyModel, build_wide

from stagewright.modeling import split
from stagewright.planner.documents import Degrees
from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.replay import replayed_ranks
from stagewright.runtime.run import run_plan

pytestmark = pytest.mark.ranks

MODELS = Path(__file__).parent / "runtime_models.py"
DATA = f"{MODELS}:data"


def test_every_rank_of_a_plan_is_replayed_within_three_percent_of_its_predicted_memory():
    from stagewright.profiler.model_profile import profile_model

    model = f"{MODELS}:build_wide"
    profile = profile_model(
        model, data=DATA, microbatches=(4,), sequence_length=8, device="cpu", budget_s=0.5, optimizer="sgd-momentum"
    )
    plan = plan_of(split(build_wide()), profile, "1f1b", 2, 4, microbatch=4, optimizer="sgd-momentum")
    report = run_plan(plan, profile, model=model, data=DATA, steps=3, replay="all", checks=())
    assert report.replayed is not None
    assert [row["rank"] for row in report.replayed] == [0, 1]
    assert set(report.replayed[0]["actions"]) == {"0F", "0B", "0OPT"}
    for row in report.replayed:
        assert abs(row["peak_memory_bytes"]["error"]) <= 0.03, row["peak_memory_bytes"]
        for action in row["actions"].values():
            assert action["measured"] > 0
    assert 0.02 <= report.predicted["step_time_s"] / report.measured["step_time_s"]["median"] <= 50
    assert report.to_json()["replayed"] == report.replayed


def test_a_rank_alone_takes_the_memory_that_it_takes_among_its_peers(rank_pools):
    pool = rank_pools(4)
    case = Case("zb-h1", 2, 4, degrees={"tp": 2, "sp": True}, dropout=0.0, num_blocks=4, tied=False, width=256)
    prepared = prepare(case, pool.next_number())
    among_peers = pool.run("peak_memory", prepared)
    profile = profile_of(split(build_wide()), tensor_degrees=(1, 2))
    report = run_plan(prepared.plan, profile, model=f"{MODELS}:build_wide", data=DATA, steps=1, replay="2", checks=())
    (row,) = report.replayed
    held = prepared.plan.cluster.groups[0].device.reserved_bytes + profile.framework_bytes
    assert row["peak_memory_bytes"]["measured"] - held == pytest.approx(among_peers[2], rel=0.03)
    assert report.measured["peak_memory_bytes"][0] is None


def test_the_devices_of_a_pipeline_rank_are_replayed_once():
    chain = split(TinyModel(3))
    plan = plan_of(chain, profile_of(chain), "1f1b", 2, 4, degrees=Degrees(tp=2, dp=2))
    assert replayed_ranks(plan, "all") == (0, 4)
    assert replayed_ranks(plan, "5") == (5,)
    with pytest.raises(InvalidArgument, match="the plan has ranks 0 to 7"):
        replayed_ranks(plan, "8")


def test_the_partition_of_least_memory_needs_the_memory_that_was_predicted_for_it():
    from stagewright.planner.documents import TrainingJob
    from stagewright.planner.documents.job import Optimizer, Pins, SearchSpace
    from stagewright.planner.planning import make_plan
    from stagewright.profiler.model_profile import profile_model

    model = f"{MODELS}:build_wide"
    profile = profile_model(
        model, data=DATA, microbatches=(4,), sequence_length=8, device="cpu", budget_s=0.5, optimizer="sgd-momentum"
    )
    job = TrainingJob(
        global_batch=16,
        sequence_length=8,
        precision="fp32",
        optimizer=Optimizer.standard("sgd-momentum", "fp32"),
        space=SearchSpace(schedules=("1f1b",), pins=Pins(pp=2, microbatch=4)),
    )
    equal = plan_of(split(build_wide()), profile, "1f1b", 2, 4, microbatch=4, optimizer="sgd-momentum")
    found = make_plan(profile, equal.cluster, job, planner="mcap", top=0).plan
    assert found is not None
    report = run_plan(found, profile, model=model, data=DATA, steps=3, replay="all", checks=())
    errors = [row["peak_memory_bytes"]["error"] for row in report.replayed]
    assert len(errors) == 2
    assert max(abs(error) for error in errors) <= 0.05, errors
