"""Optimizer states in host memory: weights are those without, the device holds less and the host the rest, to the byte."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("torch")
import torch
from runtime_cases import LENGTH, Case, make_model, prepare
from runtime_documents import profile_of
from test_schedules import assert_equal_to_one_process

from stagewright.modeling import split
from stagewright.planner.prediction import evaluate
from stagewright.runtime import piecewise_optimizer
from stagewright.runtime.offload import last_elements
from stagewright.runtime.piecewise_optimizer import PiecewiseOptimizer

SHARES = ({"optimizer_offload": 1.0}, {"optimizer_offload": 0.4})

CASES = [
    Case("1f1b", 2, 4, by_stage=SHARES, degrees={"dp": 2}, clip_norm=0.05),
    Case("zb-h1", 2, 4, by_stage=SHARES, degrees={"dp": 2, "zero": 1}, dtype="float64", tied=False, weight_decay=0.1),
    Case("1f1b", 2, 4, by_stage=({"zero": 3, "optimizer_offload": 0.5}, {"zero": 0}), degrees={"dp": 2}),
    Case("gpipe", 1, 2, by_stage=({"optimizer_offload": 0.5},), degrees={"tp": 2}, dropout=0.0),
]


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.schedule}-{case.degrees}")
def test_plans_with_optimizer_states_on_the_host_equal_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "dtype"), [(1, "float32"), (1, "bfloat16"), (3, "bfloat16")])
def test_weights_are_the_same_bits_and_the_states_lie_where_the_plan_has_them(rank_pools, zero, dtype):
    pool = rank_pools(4)
    case = Case("gpipe", 1, 2, degrees={"dp": 4, "zero": zero}, dropout=0.0, tied=False, dtype=dtype)
    plain = prepare(case, pool.next_number())
    away = prepare(replace(case, by_stage=({"optimizer_offload": 0.75},)), pool.next_number())
    expected, found = (pool.run("degree_cases.trained_state", each) for each in (plain, away))
    for (digest, states), (expected_digest, whole) in zip(found, expected, strict=True):
        assert digest == expected_digest
        elements = whole.optimizer / 8
        masters = 0.0 if dtype == "float32" else 4.0
        assert states.host == pytest.approx(0.75 * elements * (8 + masters), rel=0.002)
        narrow = 2 * elements if (zero, dtype) == (3, "bfloat16") else 0.0
        assert whole.states + narrow - states.states == pytest.approx(states.host, abs=64)  # counts of steps


def test_states_of_a_weight_that_a_stage_has_twice_are_on_the_host_once():
    plan = prepare(Case("gpipe", 1, 2, by_stage=({"optimizer_offload": 1.0},), tied=True), 0).plan
    profile = profile_of(split(make_model(Case("gpipe", 1, 2), 0)), sequence_length=LENGTH)
    found = evaluate(plan, profile)
    assert found.prediction.memory[0].optimizer == 0.0
    assert found.host_bytes[0] == 8.0 * profile.num_parameters


TRAFFIC = [
    Case("1f1b", 2, 3, by_stage=SHARES),
    Case("1f1b", 2, 3, by_stage=SHARES, degrees={"dp": 2, "zero": 1}, tied=False),
    Case("interleaved", 2, 4, num_chunks=2, by_stage=(*SHARES, *SHARES), degrees={"dp": 2, "zero": 2}, tied=False),
]


@pytest.mark.ranks
@pytest.mark.parametrize("case", TRAFFIC, ids=lambda case: f"{case.schedule}-{case.degrees}")
def test_copies_between_device_and_host_are_the_predicted_ones_and_so_is_what_lies_there(rank_pools, case):
    pool = rank_pools(case.world)
    prepared = prepare(replace(case, dropout=0.0), pool.next_number())
    profile = profile_of(split(make_model(case, 4)), sequence_length=LENGTH, output_bytes=LENGTH * 16 * 4.0)
    evaluation = evaluate(prepared.plan, profile)
    results = pool.run("degree_cases.sent_in_the_second_step", prepared)
    measured = {name: sum(sent.get(name, 0.0) for sent in results) for sent in results for name in sent}
    assert evaluation.prediction.link_bytes["copy/host"] > 0
    assert {name: value for name, value in measured.items() if value} == pytest.approx(
        evaluation.prediction.link_bytes, rel=1e-9
    )
    held = pool.run("degree_cases.held_states", prepared)
    for devices, expected in zip(prepared.plan.mapping.pipeline_ranks, evaluation.host_bytes, strict=True):
        for rank in devices:
            assert held[rank].host == pytest.approx(expected, rel=0.002)


@pytest.mark.ranks
def test_a_peak_is_lower_by_what_lies_on_the_host(rank_pools):
    pool = rank_pools(2)
    case = Case("1f1b", 2, 4, dropout=0.0, tied=False, width=64)
    away = replace(case, by_stage=({"optimizer_offload": 1.0}, {}))
    plain, lower = (pool.run("peak_memory", prepare(each, pool.next_number())) for each in (case, away))
    (first, _) = pool.run("degree_cases.held_states", prepare(away, pool.next_number()))
    assert plain[0] - lower[0] == pytest.approx(first.host, rel=0.01)
    assert plain[1] == pytest.approx(lower[1], rel=0.001)


@pytest.mark.ranks
def test_training_goes_on_under_a_plan_that_keeps_other_states_on_the_host(rank_pools, tmp_path):
    pool = rank_pools(4)
    cases = (
        Case("1f1b", 2, 4, by_stage=SHARES, degrees={"dp": 2}, num_blocks=3, dropout=0.0, dtype="float64"),
        Case(
            "gpipe",
            1,
            4,
            by_stage=({"optimizer_offload": 0.3},),
            degrees={"dp": 4, "zero": 1},
            microbatch=1,
            num_blocks=3,
            dropout=0.0,
            dtype="float64",
        ),
    )
    first, second = (prepare(case, pool.next_number()) for case in cases)
    for error in pool.run("continue_under_another_plan", (first, second, str(tmp_path))):
        assert error <= 1e-10


def test_the_device_holds_one_piece_at_most_beside_what_stays(monkeypatch):
    """Ten numbers, six of them away in pieces of four and two: after the step the device has the states of four."""
    monkeypatch.setattr(piecewise_optimizer, "PIECE_ELEMENTS", 4)
    parameter = torch.nn.Parameter(torch.arange(10.0))
    copied = []
    stepper = PiecewiseOptimizer(lambda given: torch.optim.Adam(given, lr=0.1), [(parameter, 6)], copied.append)
    parameter.grad = torch.ones(10)
    for _ in range(2):
        stepper.step()
    sizes = [value.untyped_storage().nbytes() for value in stepper.held_states() if value.dim()]
    assert sorted(sizes, reverse=True) == [16, 16, 0, 0, 0, 0]
    assert stepper.host_bytes() == 6 * 2 * 4
    assert sum(copied) == 3 * 6 * 2 * 4  # away, here and away again
    expected = torch.nn.Parameter(torch.arange(10.0))
    expected.grad = torch.ones(10)
    plain = torch.optim.Adam([expected], lr=0.1)
    for _ in range(2):
        plain.step()
    assert torch.equal(parameter, expected)
    assert torch.equal(stepper.state[parameter]["exp_avg"], plain.state[expected]["exp_avg"])


def test_masters_are_stepped_piece_by_piece_on_gradients_in_bf16(monkeypatch):
    """Ten masters in pieces of four, four and two: the bits of a step on all of the widened gradient."""
    monkeypatch.setattr(piecewise_optimizer, "widened_elements", lambda kind: 4)
    masters, expected = (torch.nn.Parameter(torch.arange(10.0)) for _ in range(2))
    masters.grad_dtype = torch.bfloat16
    stepper = PiecewiseOptimizer(partial(torch.optim.AdamW, lr=0.1), [(masters, 0)], lambda _: None)
    plain = torch.optim.AdamW([expected], lr=0.1)
    for step in range(2):
        masters.grad = torch.linspace(-1, step, 10).bfloat16()
        expected.grad = masters.grad.float()
        stepper.step()
        plain.step()
    assert [value.numel() for value in stepper.held_states() if value.dim()] == [4, 4, 4, 4, 2, 2]
    assert torch.equal(masters, expected)
    assert stepper.host_bytes() == 0


def test_the_last_elements_of_several_tensors_are_counted_from_the_end():
    assert last_elements([5, 3, 4], 6) == [0, 2, 4]
    assert last_elements([5, 3, 4], 12) == [5, 3, 4]
    assert last_elements([5, 3, 4], 0) == [0, 0, 0]
