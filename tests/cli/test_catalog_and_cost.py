"""`catalog`, `cluster` and `cost` on the command line: one JSON document, numbers that agree with the library."""

from __future__ import annotations

import json

import pytest

from stagewright.cli.main import run
from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import Cluster, Degrees, Recompute, TrainingJob
from stagewright.planner.prediction import evaluate


def answer(capsys, *arguments, code=0):
    assert run([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_catalogue_lists_devices_models_and_clusters(capsys):
    devices = answer(capsys, "catalog", "gpus")
    assert len(devices) >= 20
    assert all(row["device"]["reference"] for row in devices)
    models = answer(capsys, "catalog", "models")
    assert len(models) >= 25
    row = next(row for row in models if row["name"] == "deepseek-v3")
    assert row["parameters"] == row["published_parameters"] == 671026404352
    assert answer(capsys, "catalog", "clusters", "dgx-h100")[0]["groups"][0]["device"] == "h100-sxm"
    assert answer(capsys, "catalog", "gpus", "nothing") == []


@pytest.mark.parametrize(
    "command",
    [
        ["catalog", "gpus", "h100"],
        ["catalog", "models", "gpt2"],
        ["catalog", "clusters", "dgx"],
        ["cluster", "show", "dgx-h100:2"],
        ["cost", "memory"],
    ],
)
def test_without_json_there_is_a_table(capsys, command):
    assert run(command) == 0
    assert capsys.readouterr().out.strip()


def test_a_cluster_is_shown_and_written(capsys, tmp_path):
    path = tmp_path / "cluster.json"
    shown = answer(capsys, "cluster", "show", "a100-sxm-80g:8x2", "-o", str(path))
    assert Cluster.load(path).model_dump(mode="json") == shown
    assert answer(capsys, "cluster", "lint", str(path)) == {
        "cluster": "a100-sxm-80g:8x2",
        "num_devices": 16,
        "warnings": [],
    }
    error = answer(capsys, "cluster", "show", "a100-sxm-80g:8x0", code=2)["error"]
    assert error["field"] == "cluster"
    assert answer(capsys, "cluster", "show", "dgx-h100", "-o", str(tmp_path / "none" / "x.json"), code=2)


def test_formulas_are_shown(capsys):
    states = answer(capsys, "cost", "memory", "--parameters", "7.5e9", "--replicas", "64")
    assert [round(row["total_bytes"] / 1e9, 1) for row in states] == [120.0, 31.4, 16.6, 1.9]
    grids = answer(capsys, "cost", "tensor", "--tokens", "65536", "--hidden", "8192")
    assert [row["grid"] for row in grids if row["fastest"]] != ["1d"]
    layouts = answer(capsys, "cost", "context", "--sequence", "4096", "--degree", "8")
    assert layouts["imbalance"]["zig-zag"] == 1.0
    layer = answer(capsys, "cost", "experts")
    assert layer["layer_s"] <= layer["unchunked_s"]


@pytest.fixture
def runs(tmp_path):
    rows = []
    for index, (dp, microbatch) in enumerate(((4, 2), (4, 8), (2, 8))):
        job = TrainingJob(global_batch=32, sequence_length=512)
        profile, cluster = resolve_model("gpt2"), resolve_cluster("a100-sxm-80g:4x1")
        choice = Choice(Degrees(dp=dp), 1, 1, microbatch, "1f1b", Recompute.NONE)
        plan = even_plan(profile, cluster, job, choice)
        plan.save(tmp_path / f"plan{index}.json")
        seconds = 1.2 * evaluate(plan, profile).prediction.step_time_s
        rows.append({"plan": f"plan{index}.json", "step_time_s": seconds, "name": f"run {index}"})
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(rows))
    return path


def test_fit_reports_in_sample_and_cross_validated_errors_and_writes_the_cluster(capsys, runs, tmp_path):
    target = tmp_path / "fitted.json"
    found = answer(capsys, "cost", "fit", str(runs), "--only", "matmul", "--only", "memory", "-o", str(target))
    assert set(found["factors"]) == {"matmul", "memory"}
    assert found["error"]["in_sample"]["mean"] < found["error"]["before"]["mean"]
    assert "cross_validated" in found["error"]
    assert Cluster.load(target).groups[0].device.source.value == "fitted"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("{}", "runs"),
        ("[]", "runs"),
        ('[{"step_time_s": 1.0}]', "runs[0].plan"),
        ('[{"plan": "plan0.json", "step_time_s": "fast"}]', "runs[0].step_time_s"),
        ('[{"plan": "plan0.json", "step_time_s": 0}]', "runs[0].step_time_s"),
        ('[{"plan": "plan0.json", "step_time_s": 1, "speed": 2}]', "runs[0].speed"),
    ],
)
def test_bad_runs_are_refused_by_field(capsys, runs, content, field):
    runs.write_text(content)
    assert answer(capsys, "cost", "fit", str(runs), code=2)["error"]["field"] == field


def test_hot_experts_that_move_make_the_busiest_device_shorter_than_their_copies(capsys):
    skewed = answer(capsys, "cost", "experts", "--num-experts", "64", "--top-k", "4", "--skew", "0.8", "--dynamic", "4")
    assert skewed["moved_experts"] > 0
    assert skewed["rebalanced_straggler"] < 0.8 * skewed["straggler_tokens"]
    assert skewed["longest_copy_s"] < skewed["rebalanced_device_s"] < skewed["busiest_device_s"]
    still = answer(capsys, "cost", "experts", "--num-experts", "64", "--top-k", "4", "--skew", "0.8", "--dynamic", "0")
    assert still["rebalanced_straggler"] == still["straggler_tokens"] == skewed["straggler_tokens"]
