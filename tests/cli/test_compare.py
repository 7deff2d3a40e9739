"""`stagewright compare`: every named planner in one table, refusals included, and drift as an exit code."""

from __future__ import annotations

import json

import pytest

from stagewright.cli.main import run
from stagewright.planner.planners.registry import planners
from stagewright.testing.mocked_profile import profile_factory


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The table of all planners on six layers and two devices."""
    folder = tmp_path_factory.mktemp("compare")
    profile_factory(6, tensor_degrees=(1, 2)).save(folder / "profile")
    import io
    from contextlib import redirect_stdout

    out = io.StringIO()
    with redirect_stdout(out):
        code = run(
            ["compare", str(folder / "profile"), "--cluster", "a100-sxm-80g:2x1", "--global-batch", "8", "--json"]
        )
    assert code == 0
    return json.loads(out.getvalue())["rows"]


def test_all_names_every_planner_once(rows):
    assert [row["name"] for row in rows] == [row.name for row in planners()]


def test_each_row_has_a_plan_or_says_why_not(rows):
    for row in rows:
        assert ("step_time_s" in row) != ("message" in row), row
        assert {"objective", "own_objective", "peak_memory_bytes", "wall_s", "gap"} <= row.keys() or row["message"]


def test_no_planner_is_below_the_bound_that_the_exact_one_proved(rows):
    assert all(row["gap"] >= -1e-9 for row in rows if "gap" in row)
    assert min(row["step_time_s"] for row in rows if "step_time_s" in row) >= rows[0]["step_time_s"] / 1.01


def test_drift_beyond_the_allowed_percentage_exits_6(tmp_path):
    profile_factory(6).save(tmp_path / "profile")
    command = ["compare", str(tmp_path / "profile"), "--cluster", "a100-sxm-80g:2x1", "--global-batch", "8", "--json"]
    command += ["--planners", "megatron,mcap"]
    assert run([*command, "--fail-over", "10000"]) == 0
    assert run([*command, "--fail-over", "0.001"]) == 6
