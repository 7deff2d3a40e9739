"""`validate` names what a plan breaks: memory, batch, and what a format would write differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stagewright.cli.main import run
from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planning import make_plan


def _saved(path: Path, **space: object) -> str:
    fields = SearchSpace.model_validate({"pins": Pins(dp=2, pp=2), **space})
    job = TrainingJob(global_batch=16, sequence_length=1024, space=fields)
    plan = make_plan(resolve_model("gpt2"), resolve_cluster("a100-sxm-80g:4x1"), job, top=0).plan
    assert plan is not None
    plan.save(path)
    return str(path)


def test_a_plan_for_a_format_is_valid_there_and_another_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitting = _saved(tmp_path / "megatron.json", target="megatron-args")
    assert run(["validate", fitting, "--target", "megatron-args", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"valid": True, "violations": []}
    other = _saved(tmp_path / "other.json", schedules=("zb-h1",))
    assert run(["validate", other, "--target", "megatron-args", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert [row["field"] for row in document["violations"]].count("schedule.name") == 1
    assert all(row["code"] == "target" and "--target" in row["hint"] for row in document["violations"])


def test_a_smaller_device_and_fewer_devices_are_violations_with_both_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _saved(tmp_path / "plan.json")
    assert run(["validate", path, "--cluster", "a100-sxm-80g:2x1", "--json"]) == 2
    rows = json.loads(capsys.readouterr().out)["violations"]
    assert "4 ranks" in rows[0]["message"] and "2 devices" in rows[0]["message"]
