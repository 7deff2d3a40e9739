"""`rent`, `phases` and `hetpipe` answer what their Python functions answer, and say what is wrong with a question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stagewright.cli.main import run
from stagewright.planner.documents import Plan, TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.planners.hetpipe import allocate, chain_costs, most_missing, nodes_of, plan_worker
from stagewright.planner.post_training import Phase, plan_round
from stagewright.testing.mocked_cluster import cluster_factory, mixed_cluster_factory
from stagewright.testing.mocked_profile import profile_factory

PROFILE = profile_factory(
    6, forward_s=1e-3, parameters=20_000_000, activation_bytes=4e6, output_bytes=1e5, microbatches=(1, 2, 4)
)
ZONES = mixed_cluster_factory(
    [
        cluster_factory(2, 1, name="fast", device="fast", flops=300e12, price_per_hour=2.0),
        cluster_factory(2, 1, name="slow", device="slow", flops=150e12),
    ],
    bytes_per_s=1e9,
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, Path]:
    PROFILE.save(tmp_path / "profile.json")
    ZONES.save(tmp_path / "zones.json")
    return str(tmp_path / "profile.json"), str(tmp_path / "zones.json"), tmp_path


def test_the_rental_and_its_plan_are_written(files, capsys):
    profile, zones, folder = files
    asked = ["rent", profile, "--zones", zones, "--global-batch", "8", "--json"]
    assert run(asked) == 2
    assert "has no price" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert run([*asked, "--price", "slow=0.5", "-o", str(folder / "plan.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nodes"] == {"slow-1": 1}  # half the speed for a quarter of the price
    assert found["choices"] == found["searched"] == 3
    plan = Plan.load(folder / "plan.json")
    dollars = plan.prediction.step_time_s * found["dollars_per_hour"] / 3600
    assert found["tokens_per_dollar"] == pytest.approx(8 * 128 / dollars)
    assert run([*asked, "--price", "middle=1"]) == 2
    assert "fast-0, slow-1" in json.loads(capsys.readouterr().out)["error"]["hint"]


def test_phases_are_planned_together(files, capsys):
    profile, _, folder = files
    job = TrainingJob(
        global_batch=8, sequence_length=128, precision="fp32", space=SearchSpace(schedules=("1f1b",), zero=(0,))
    )
    cluster_factory(2, 1, bytes_per_s=5e9).save(folder / "cluster.json")
    rows = [{"name": name, "model": profile, "job": job.model_dump(mode="json"), "repeats": 3} for name in ("a", "b")]
    (folder / "round.json").write_text(json.dumps({"phases": rows}))
    assert run(["phases", str(folder / "round.json"), "--cluster", str(folder / "cluster.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = plan_round([Phase(name, PROFILE, job, 3) for name in ("a", "b")], cluster_factory(2, 1, bytes_per_s=5e9))
    assert found["round_s"] == pytest.approx(wanted.round_s)
    assert [phase["name"] for phase in found["phases"]] == ["a", "b"]
    (folder / "round.json").write_text(json.dumps({"phases": []}))
    assert run(["phases", str(folder / "round.json"), "--cluster", str(folder / "cluster.json"), "--json"]) == 2
    assert "phases" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_virtual_workers_of_one_gpu_of_each_node_are_alike(files, capsys):
    profile, zones, _ = files
    asked = [
        "hetpipe",
        profile,
        "--cluster",
        zones,
        "--policy",
        "equal",
        "--minibatch",
        "2",
        "--distance",
        "1",
        "--json",
    ]
    assert run(asked) == 0
    found = json.loads(capsys.readouterr().out)
    job = TrainingJob(global_batch=2, sequence_length=128)
    gpus = allocate(nodes_of(PROFILE, ZONES, job), "equal")
    wanted = plan_worker(chain_costs(PROFILE, ZONES, job), gpus[0])
    assert len(found["workers"]) == 2
    for worker in found["workers"]:
        assert sorted(worker["gpus"]) == ["fast", "slow"]
        assert worker["minibatch_s"] == pytest.approx(wanted.minibatch_s)
        assert worker["most_missing_updates"] == most_missing(wanted.in_flight, 1)
        slow = worker["gpus"].index("slow")
        layers = [b - a for a, b in zip(worker["layers"], worker["layers"][1:], strict=False)]
        assert layers[slow] == 2  # a third of the rate, a third of the layers
    assert run([*asked, "--policy", "pairs"]) == 2


def test_sequences_of_different_length_are_grouped_and_bad_lengths_are_named(files, capsys):
    asked = ["sequences", "gpt2", "--cluster", "a100-sxm-80g:4x1", "--json", "--lengths"]
    assert run([*asked, "1024x2,256x9"]) == 0
    found = json.loads(capsys.readouterr().out)
    held = [(int(length), count) for group in found["groups"] for length, count in group["counts"].items()]
    assert sum(count for length, count in held if length == 1024) == 2
    assert sum(count for length, count in held if length == 256) == 9
    assert found["bound_s"] <= found["step_s"] * (1 + 1e-9) <= min(found["uniform_step_s"].values()) * (1 + 2e-9)
    assert found["blocks_bytes"] <= found["ring_bytes"]
    assert sum(found["block_loads"]) == pytest.approx(11 * 0.5)
    assert run([*asked, "1024y2"]) == 2
    assert "1024y2" in json.loads(capsys.readouterr().out)["error"]["message"]
