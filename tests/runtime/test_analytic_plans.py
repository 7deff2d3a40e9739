"""A plan that was made from a configuration alone runs over the layers of the model that the configuration makes."""

from __future__ import annotations

import json
from functools import partial

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from planned_problems import CONFIGS, on_processors
from test_planned_problems import launch_on_pool

from stagewright.cli.main import run as command
from stagewright.cli.simulate import find_profile
from stagewright.modeling import split
from stagewright.modeling.hugging_face import huggingface_model
from stagewright.planner.catalog import resolve_cluster
from stagewright.planner.documents import TrainingJob
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.models.hugging_face import profile_from_config
from stagewright.planner.planning import make_plan
from stagewright.profiler.analytic_layers import over_layers
from stagewright.runtime import run
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIGS["mixtral"]))
    return path


@pytest.mark.ranks
def test_experts_that_a_configuration_was_planned_with_run(rank_pools, monkeypatch, tmp_path, capsys, config):
    monkeypatch.setattr(run, "launch", partial(launch_on_pool, rank_pools))
    on_processors(resolve_cluster("a100-sxm-40g:4x1")).save(tmp_path / "cluster.json")
    plan, report = tmp_path / "plan.json", tmp_path / "out" / "run.json"
    sizes = [
        "--cluster",
        str(tmp_path / "cluster.json"),
        "--global-batch=4",
        "--sequence-length=32",
        "--precision=fp32",
    ]
    pins = [f"--pin={pin}" for pin in ("pp=2", "dp=2", "ep=2", "microbatch=1", "schedule=1f1b")]
    assert command(["plan", str(config), *sizes, *pins, "-o", str(plan), "--json"]) == 0
    checks = ["--steps=1", "--check=gradients,traffic"]
    code = command(["run", str(plan), "--model", str(config), *checks, "-o", str(report), "--json"])
    assert code == 0, capsys.readouterr().out
    ran = json.loads(report.read_text())
    assert ran["checks"]["gradients"]["passed"] and ran["checks"]["traffic"]["passed"]
    assert ran["checks"]["traffic"]["measured_bytes"]["all-to-all/ep"] > 0


def test_a_configuration_without_an_analytic_profile_leaves_the_profile_beside_the_plan_as_it_is(tmp_path, config):
    profile = profile_factory(4)
    job = TrainingJob(global_batch=4, sequence_length=128, precision="fp32")
    plan = make_plan(profile, cluster_factory(2), job).plan
    assert plan is not None
    profile.save(tmp_path / "profile.json")
    config.write_text('{"model_type": "whisper"}')
    assert find_profile(plan, tmp_path / "plan.json", str(config)).digest == profile.digest


def test_a_plan_for_accelerators_is_refused_where_there_are_none(monkeypatch, tmp_path, capsys, config):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = tmp_path / "plan.json"
    sizes = ["--cluster=a100-sxm-40g:2x1", "--global-batch=4", "--sequence-length=32"]
    assert command(["plan", str(config), *sizes, "-o", str(plan), "--json"]) == 0
    capsys.readouterr()
    assert command(["run", str(plan), "--model", str(config), "--json"]) == 2
    assert "torch sees no CUDA device here" in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"num_hidden_layers": 3}, "layers, the profile"), ({"intermediate_size": 96}, "parameters, .* of the profile")],
)
def test_a_model_of_other_layers_than_the_configuration_that_was_planned_is_refused(config, change, words):
    profile = profile_from_config({**CONFIGS["mixtral"], **change}, "other")
    with pytest.raises(InvalidDocument, match=words):
        over_layers(profile, split(huggingface_model(str(config))))
