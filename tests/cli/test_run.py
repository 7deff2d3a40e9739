"""`stagewright run`: what is refused before any rank starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
from stagewright.cli.main import run
from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import Degrees, Recompute, TrainingJob
from stagewright.planner.prediction import with_prediction
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


def test_autocast_reaches_the_plan_and_other_types_than_bf16_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = profile_factory(4, microbatches=(1,))
    job = TrainingJob(global_batch=4, sequence_length=128, precision="fp32")
    plan = even_plan(profile, cluster_factory(2), job, Choice(Degrees(), 2, 1, 1, "1f1b", Recompute.NONE))
    profile.save(tmp_path / "profile.json")
    with_prediction(plan, profile).save(tmp_path / "plan.json")
    code = run(["run", str(tmp_path / "plan.json"), "--model", "absent:build", "--autocast", "fp8", "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert code == 2
    assert error["message"] == "autocast is fp8 with weights in fp32, the runtime takes bf16 over fp32"
