"""`stagewright profile` from the outside: documents, exit codes, files."""

import json
from dataclasses import dataclass

import pytest

from stagewright.cli import main
from stagewright.planner.documents import ModelProfile
from stagewright.testing import profile_factory


@dataclass
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main.run(["profile", *map(str, arguments)])
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return call


def test_a_model_is_measured_written_and_found_in_the_cache_again(run, tiny_model_file, tmp_path):
    common = (f"{tiny_model_file}:build", "--microbatches", "1", "--sequence-length", "16", "--budget", "0.2")
    common = (*common, "--busy-ranks", "1", "--device", "cpu", "--cache", tmp_path / "cache", "--json")
    first = run(*common, "-o", tmp_path / "first.json")
    assert first.returncode == 0, first.stderr
    written = ModelProfile.load(tmp_path / "first.json")
    assert ModelProfile.from_object(json.loads(first.stdout)).digest == written.digest
    second = ModelProfile.from_object(json.loads(run(*common).stdout))
    assert second.classes == written.classes


def test_show_writes_one_page_without_outside_requests(run, tmp_path):
    profile_factory(3, forward_s=[1e-3, 2e-3, 3e-3]).save(tmp_path / "profile.json")
    done = run("show", tmp_path / "profile.json", "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "layer.2" in page
    assert "http" not in page
    assert "<script" not in page


def test_diff_and_merge_print_one_json_document(run, tmp_path):
    profile_factory(2, microbatches=(1,)).save(tmp_path / "one.json")
    profile_factory(2, microbatches=(2,), forward_s=2e-3).save(tmp_path / "two.json")
    found = json.loads(run("diff", tmp_path / "one.json", tmp_path / "two.json", "--json").stdout)
    assert found["same_layers"] is True
    assert found["added"] == ["mocked-0 at microbatch 2, sequence 128, tensor degree 1"]
    merged = run("merge", tmp_path / "one.json", tmp_path / "two.json", "-o", tmp_path / "both.json", "--json")
    assert merged.returncode == 0, merged.stderr
    both = ModelProfile.load(tmp_path / "both.json")
    assert [cost.key for cost in both.classes["mocked-0"].costs] == [(1, 128, 1), (2, 128, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.py:build",), "there is no file 'missing.py'"),
        (("model.py:absent",), "has no 'absent'"),
        (("model.py:build", "--microbatches", "0"), "must be positive"),
        (("model.py:build", "--microbatches", "x"), "is not numbers separated by commas"),
        (("model.py:build", "-o", "nowhere/profile.json"), "the folder nowhere does not exist"),
        (("model.py:build", "--layers", "blocks"), "the pattern 'blocks' names no list of layers"),
        (("show", "absent.json"), "cannot be read"),
    ],
)
def test_what_cannot_be_done_exits_with_2_and_says_why(run, monkeypatch, tiny_model_file, arguments, message):
    tiny_model_file.rename(tiny_model_file.with_name("model.py"))
    monkeypatch.chdir(tiny_model_file.parent)
    done = run(*arguments, "--json")
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout)["error"]
    assert message in error["message"]
