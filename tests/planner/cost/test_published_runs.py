"""Predictions against published iteration times; the whole comparison is benchmarks/published.py."""

import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost.even_plan import even_plan, stage_ranges
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import Degrees, Optimizer, Recompute, TrainingJob
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.prediction import evaluate

MEGATRON = Optimizer(name="adam", parameter_bytes=2, gradient_bytes=4, state_bytes=12)


def step_s(name, nodes, batch, degrees, pp, v, microbatch, recompute):
    job = TrainingJob(global_batch=batch, sequence_length=2048, precision="fp16", optimizer=MEGATRON)
    profile, cluster = resolve_model(name), resolve_cluster(f"a100-sxm-80g:8x{nodes}")
    family = "1f1b" if v == 1 else "interleaved"
    plan = even_plan(profile, cluster, job, Choice(degrees, pp, v, microbatch, family, recompute))
    return evaluate(plan, profile).prediction.step_time_s


@pytest.mark.parametrize(
    ("name", "pp", "batch", "microbatch", "v", "full_s", "selective_s"),
    [("megatron-22b", 1, 4, 4, 1, 1.42, 1.10), ("gpt3-175b", 8, 64, 1, 3, 18.13, 13.75)],
)
def test_iterations_of_korthikanti_are_met_within_four_percent(name, pp, batch, microbatch, v, full_s, selective_s):
    full = step_s(name, pp, batch, Degrees(tp=8, vocab_parallel=True), pp, v, microbatch, Recompute.FULL)
    selective = step_s(
        name, pp, batch, Degrees(tp=8, sp=True, vocab_parallel=True), pp, v, microbatch, Recompute.SELECTIVE
    )
    assert full == pytest.approx(full_s, rel=0.04)
    assert selective == pytest.approx(selective_s, rel=0.04)


@pytest.mark.parametrize(
    ("size", "tp", "pp", "devices", "batch", "microbatch", "v", "h", "layers", "teraflops"),
    [
        ("1.7b", 1, 1, 32, 512, 16, 1, 2304, 24, 137),
        ("7.5b", 4, 1, 128, 512, 16, 1, 4096, 36, 142),
        ("39.1b", 8, 2, 512, 1536, 8, 12, 8192, 48, 138),
        ("145.6b", 8, 8, 1536, 2304, 2, 10, 12288, 80, 148),
    ],
)
def test_rows_of_sc21_that_no_efficiency_was_fitted_on_are_met_within_fifteen_percent(
    size, tp, pp, devices, batch, microbatch, v, h, layers, teraflops
):
    degrees = Degrees(dp=devices // (tp * pp), tp=tp, vocab_parallel=tp > 1)
    seconds = step_s(f"megatron-{size}", devices // 8, batch, degrees, pp, v, microbatch, Recompute.FULL)
    flops = 96 * batch * 2048 * layers * h**2 * (1 + 2048 / (6 * h) + 51200 / (16 * layers * h))
    assert flops / devices / seconds / 1e12 == pytest.approx(teraflops, rel=0.15)


def test_stages_are_even_and_cover_every_layer():
    profile = resolve_model("megatron-22b")
    ranges = list(stage_ranges(profile, 8))
    assert ranges[0][0] == 0
    assert ranges[-1][1] == profile.num_layers
    assert [end - first for first, end in ranges] == [7, 6, 6, 6, 6, 6, 6, 9]
    with pytest.raises(InvalidArgument, match="48 blocks do not fill 49 stages"):
        list(stage_ranges(profile, 49))


def test_a_batch_that_does_not_divide_is_refused():
    job = TrainingJob(global_batch=10, sequence_length=128)
    choice = Choice(Degrees(dp=4), 1, 1, 1, "1f1b", Recompute.NONE)
    with pytest.raises(InvalidArgument, match=r"global batch 10 does not divide by dp \* microbatch = 4 \* 1"):
        even_plan(resolve_model("gpt2"), resolve_cluster("a100:4x1"), job, choice)
