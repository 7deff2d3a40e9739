"""Bad input, everywhere: a message that names the field and both values, exit code 2, no traceback, nothing half written."""

from __future__ import annotations

import json

import pytest

from stagewright.cli.main import run
from stagewright.testing import cluster_factory, profile_factory

SCHEDULE = ["schedule", "1f1b", "--ranks", "4", "--microbatches", "8"]


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    profile_factory(4).save(path)
    return str(path)


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "cluster.json"
    cluster_factory(2).save(path)
    return str(path)


def refused(capsys, arguments) -> dict[str, str | None]:
    """Run, expect exit code 2, one JSON document on stdout, no traceback; return the error."""
    code = run([*arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    error = json.loads(captured.out)["error"]
    assert error["message"]
    return error


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0"])
@pytest.mark.parametrize("option", ["--forward-s", "--input-grad-s", "--weight-grad-s"])
def test_a_cost_that_is_no_positive_number_is_refused(capsys, option, value):
    error = refused(capsys, [*SCHEDULE, option, value])
    assert error["field"]


@pytest.mark.parametrize(("ranks", "microbatches"), [("0", "8"), ("4", "0"), ("-1", "8")])
def test_sizes_below_one_are_refused(capsys, ranks, microbatches):
    error = refused(capsys, ["schedule", "1f1b", "--ranks", ranks, "--microbatches", microbatches])
    assert ranks in error["message"] or microbatches in error["message"]


def test_one_rank_and_one_microbatch_are_fine(capsys):
    assert run(["schedule", "1f1b", "--ranks", "1", "--microbatches", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["makespan_s"] == 3.0


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "words"),
    [("chimera", "3", "8", "3"), ("interleaved", "4", "6", "4"), ("2bw", "8", "4", "8")],
)
def test_a_size_against_a_schedules_rule_is_refused_with_the_rule(capsys, name, ranks, microbatches, words):
    error = refused(capsys, ["schedule", name, "--ranks", ranks, "--microbatches", microbatches])
    assert words in error["message"]


def test_a_misspelt_schedule_gets_the_nearest_name(capsys):
    assert "1f1b" in str(refused(capsys, ["schedule", "1f1bb", "--ranks", "2", "--microbatches", "2"])["hint"])


def test_a_cap_below_the_need_names_both_numbers(capsys):
    error = refused(capsys, [*SCHEDULE, "--memory-cap", "2"])
    assert "4" in error["message"]
    assert "2" in error["message"]


@pytest.mark.parametrize(
    "shorthand", ["h100-sxm:8x0", "h100-sxm:0x8", "h100-sxm:8", "h100-sxm:8x-1", "nothing:8x1", ""]
)
def test_a_cluster_that_makes_no_sense_is_refused(capsys, profile, shorthand):
    refused(capsys, ["plan", profile, "--cluster", shorthand, "--global-batch", "8"])


def test_more_devices_than_the_cluster_has_is_refused_with_both_numbers(capsys, profile, cluster):
    error = refused(capsys, ["plan", profile, "--cluster", cluster, "--devices", "5", "--global-batch", "8"])
    assert "5" in error["message"]
    assert "2" in error["message"]


def test_pins_that_exceed_the_devices_are_refused_with_the_product(capsys, profile, cluster):
    error = refused(
        capsys, ["plan", profile, "--cluster", cluster, "--pin", "pp=2", "--pin", "dp=2", "--global-batch", "8"]
    )
    assert "4" in error["message"]
    assert "2" in error["message"]


@pytest.mark.parametrize("pin", ["tq=2", "tp", "tp=0", "tp=two", "zero=7", "recompute=some"])
def test_a_pin_that_means_nothing_is_refused(capsys, profile, cluster, pin):
    refused(capsys, ["plan", profile, "--cluster", cluster, "--pin", pin, "--global-batch", "8"])


def test_one_name_pinned_to_two_values_is_refused_with_both(capsys, profile, cluster):
    error = refused(
        capsys, ["plan", profile, "--cluster", cluster, "--pin", "tp=1", "--pin", "tp=2", "--global-batch", "8"]
    )
    assert "1" in error["message"]
    assert "2" in error["message"]


@pytest.mark.parametrize("batch", ["0", "-8"])
def test_a_batch_below_one_is_refused(capsys, profile, cluster, batch):
    assert batch in refused(capsys, ["plan", profile, "--cluster", cluster, "--global-batch", batch])["message"]


def test_an_unknown_model_gets_the_nearest_name(capsys):
    error = refused(capsys, ["plan", "lama2-7b", "--cluster", "h100-sxm:8x1"])
    assert "llama2-7b" in str(error["hint"]) + error["message"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"name"', '"nome"', 1),
        lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
        lambda text: "[]",
        lambda text: "not json",
        lambda text: "",
    ],
    ids=["truncated", "unknown field", "other version", "foreign", "no json", "empty"],
)
def test_a_document_that_is_not_one_is_refused_by_path(capsys, tmp_path, cluster, change):
    path = tmp_path / "broken.json"
    path.write_text(change(json.dumps(profile_factory(4).model_dump(mode="json"), indent=1)))
    error = refused(capsys, ["plan", str(path), "--cluster", cluster, "--global-batch", "8"])
    assert error["field"] or "broken.json" in error["message"]


def test_a_cluster_in_place_of_a_profile_is_refused(capsys, cluster):
    refused(capsys, ["plan", cluster, "--cluster", cluster, "--global-batch", "8"])


def test_an_unwritable_path_leaves_nothing(capsys, tmp_path, profile, cluster):
    target = tmp_path / "missing" / "plan.json"
    refused(capsys, ["plan", profile, "--cluster", cluster, "--global-batch", "8", "-o", str(target)])
    assert not target.parent.exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cluster.json", "profile.json"]


def test_a_plan_for_another_profile_is_refused_with_both_digests(capsys, tmp_path, profile, cluster):
    plan = tmp_path / "plan.json"
    assert run(["plan", profile, "--cluster", cluster, "--global-batch", "8", "-o", str(plan), "--json"]) == 0
    capsys.readouterr()
    other = tmp_path / "other.json"
    profile_factory(5).save(other)
    error = refused(capsys, ["simulate", str(plan), "--profile", str(other)])
    assert "4 layers" in error["message"]
    assert "5" in error["message"]


@pytest.mark.parametrize(
    "arguments", [["plan"], ["plan", "--cluster"], ["schedule", "1f1b", "--ranks", "four"], ["nonsense"]]
)
def test_a_usage_error_is_one_json_document_too(capsys, arguments):
    refused(capsys, arguments)


def test_a_model_by_code_is_refused_where_a_profile_is_wanted(capsys, cluster):
    error = refused(capsys, ["plan", "examples/gpt.py:build", "--cluster", cluster])
    assert "profile" in str(error["hint"])


@pytest.mark.parametrize(
    "options",
    [
        ["--objective", "frontier", "--planner", "megatron"],
        ["--target", "skypilot"],
        ["--executor", "threads"],
        ["--cluster", "a100-sxm-80g:8x1+h100-sxm:8x1", "--objective", "frontier"],
    ],
)
def test_what_is_not_searched_yet_is_refused_and_not_ignored(capsys, profile, cluster, options):
    refused(capsys, ["plan", profile, "--cluster", cluster, "--global-batch", "8", *options])
