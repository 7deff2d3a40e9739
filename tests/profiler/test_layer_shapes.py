"""The comparison of measured layers with the analytic model runs on any machine, and at 70B's shapes on CUDA."""

import itertools
import json

import pytest
import torch

from stagewright.planner.documents import ModelProfile

pytest.importorskip("transformers")
benchmark = pytest.importorskip("benchmarks.layer_shapes", reason="benchmarks are not beside the tests")


@pytest.mark.parametrize(
    "grid", [((1,), (16,), (1, 2)), pytest.param(((1, 2), (16, 32), (1, 2)), marks=pytest.mark.soak)]
)
def test_every_shape_of_the_grid_is_measured_and_priced(grid, tmp_path, capsys, monkeypatch):
    tiny = benchmark.SIZES["tiny"]
    monkeypatch.setitem(benchmark.SIZES, "tiny", benchmark.Size(tiny.config, *grid, tiny.name))
    assert benchmark.main(["--size", "tiny", "--device", "cpu", "--budget", "0", "--out", str(tmp_path)]) == 0
    (path,) = (tmp_path / "profiles").glob("llama-tiny-*.json")
    costs = next(value.costs for value in ModelProfile.load(path).classes.values() if value.kind == "block")
    assert {cost.key for cost in costs} == set(itertools.product(*grid))
    rows = json.loads((tmp_path / "benchmarks" / "results" / "layer_shapes.json").read_text())["rows"]
    assert {(row["tensor_degree"], row["microbatch"], row["sequence_length"]) for row in rows} == {
        cost.key[2:] + cost.key[:2] for cost in costs
    }
    assert {row["recompute"] for row in rows} >= {"none", "full"}
    assert all(row["measured_forward_s"] > 0 and row["analytic_forward_s"] > 0 for row in rows)
    assert "median |error| of a block's seconds" in capsys.readouterr().out


def test_the_large_layers_ask_for_a_device_that_can_hold_them(capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--size", "70b", "--device", "cpu"])
    assert ended.value.code == 2
    assert "need a CUDA device" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_70b_block_on_this_device_is_within_half_of_the_analytic_model():
    size = benchmark.SIZES["70b"]
    few = benchmark.Size(size.config, (1,), (2048,), (8,), size.name)
    profile = benchmark.measure(few, "cuda", 5.0)
    rows = benchmark.compare(profile, benchmark.analytic(few), benchmark.cluster_of(torch.device("cuda", 0)))
    assert rows
    assert all(abs(row.time_error) < 0.5 for row in rows)
