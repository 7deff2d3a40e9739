"""A deadline ends planning with what is known: exit 4 without a plan, a plan and its gap with one; progress says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stagewright.cli.main import run
from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents.outcome import Progress
from stagewright.planner.documents.request import PlanRequest
from stagewright.planner.planning import make_plan

QUESTION = ["plan", "llama2-7b", "--cluster", "a100-sxm-80g:8x2", "--global-batch", "64"]


def test_a_deadline_before_the_first_plan_is_exit_four_with_the_commands_own_document(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Deadlines below a tenth of a second are taken at their word."""
    assert run([*QUESTION, "--deadline", "0.000001", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "no_solution" and document["plan"] is None
    assert document["termination"] == "time_limit"


def test_nothing_that_fits_is_exit_three_with_the_nearest_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "llama2-7b", "--cluster", "v100-sxm-16g:1x1", "--global-batch", "4", "--json"]
    assert run(arguments) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "infeasible" and document["diagnosis"]["nearest"] is not None


def test_progress_reports_incumbent_bound_and_gap_and_a_cancel_keeps_the_incumbent() -> None:
    request = PlanRequest.from_object(
        {
            "model": "llama2-7b",
            "cluster": "a100-sxm-80g:8x2",
            "job": {"global_batch": 64, "sequence_length": 4096, "space": {"pins": {"pp": 4}}},
        }
    )
    seen: list[Progress] = []
    outcome = make_plan(
        resolve_model("llama2-7b"),
        resolve_cluster("a100-sxm-80g:8x2"),
        request.job,
        gap=0.0,
        progress=seen.append,
        should_stop=lambda: any(state.incumbent_s is not None for state in seen),
    )
    known = [state for state in seen if state.gap is not None]
    assert known and all(state.bound_s is not None and state.bound_s <= (state.incumbent_s or 0) for state in known)
    assert outcome.plan is not None and outcome.termination in ("cancelled", "optimal")
    assert outcome.bound_s is not None and outcome.objective_s is not None and outcome.bound_s <= outcome.objective_s


def test_progress_on_stderr_names_the_best_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*QUESTION, "-o", str(tmp_path / "plan.json")]) == 0
    assert "best " in capsys.readouterr().err
