"""Models with dropout are compared with one process: with it where ranks draw as one process does, without it elsewhere."""

from __future__ import annotations

import json
from functools import partial

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from planned_problems import on_processors
from test_planned_problems import launch_on_pool

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planning import make_plan
from stagewright.profiler.model_profile import profile_model
from stagewright.runtime import run
from stagewright.runtime.stillness import comparable, draws_as_one_process

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "vocab_size": 64,
    "attention_dropout": 0.1,
}


@pytest.mark.ranks
@pytest.mark.parametrize("pins", [{"tp": 2, "sp": "on"}, {"dp": 2}], ids=str)
def test_gradients_of_a_model_with_dropout_are_compared(rank_pools, monkeypatch, tmp_path, pins):
    monkeypatch.setattr(run, "launch", partial(launch_on_pool, rank_pools))
    path = tmp_path / "dropping" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIG))
    profile = profile_model(
        str(path),
        microbatches=(1, 2),
        sequence_length=16,
        tensor_degrees=(1, 2),
        device="cpu",
        dtype="fp64",
        budget_s=0.0,
        cache=tmp_path / "cache",
    )
    space = SearchSpace(pins=Pins(**pins, microbatch=1, zero=0, vocab_parallel="off"), schedules=("1f1b",))
    job = TrainingJob(global_batch=4, sequence_length=16, precision="fp64", space=space)
    plan = make_plan(profile, on_processors(resolve_cluster("a100-sxm-40g:2x1")), job).plan
    assert plan is not None
    report = run.run_plan(plan, profile, model=str(path), steps=1, checks=("gradients",), directory=tmp_path / "run")
    assert report.checks["gradients"]["passed"], report.checks["gradients"]
    assert report.checks["gradients"].get("dropout") == ("off" if "tp" in pins else None)
    assert draws_as_one_process(plan) == ("tp" not in pins)


def test_modes_come_back_behind_a_comparison():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(2))
    model[1].eval()
    space = SearchSpace(pins=Pins(tp=2), schedules=("1f1b",))
    job = TrainingJob(global_batch=4, sequence_length=128, space=space)
    plan = make_plan(resolve_model("gpt2"), on_processors(resolve_cluster("a100-sxm-40g:2x1")), job).plan
    assert plan is not None and not draws_as_one_process(plan)
    with comparable(model, plan):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model] == [True, False]
