"""Layers move between stages, or to another plan, between two steps, with their optimizer states and without a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, PreparedCase, make_model, prepare

from stagewright.modeling import split
from stagewright.planner.documents import StagePlan

pytestmark = pytest.mark.ranks

SIZES = {"dropout": 0.0, "dtype": "float64", "num_blocks": 4, "tied": False}


def with_cut(prepared: PreparedCase, number: int, cut: int) -> PreparedCase:
    """The same case with its two stages cut before another layer."""
    count = prepared.plan.num_layers
    stages = (StagePlan(layers=(0, cut)), StagePlan(layers=(cut, count)))
    return replace(prepared, plan=prepared.plan.model_copy(update={"stages": stages}), number=number)


def test_a_layer_moves_between_two_stages_with_its_optimizer_state_and_nothing_else_travels(rank_pools):
    pool = rank_pools(2)
    case = Case("1f1b", 2, 4, **SIZES)
    before = prepare(case, pool.next_number())
    first_cut = before.plan.stages[0].num_layers
    after = with_cut(before, pool.next_number(), first_cut - 1)
    results = pool.run("live_move", (before, after))
    moved = split(make_model(case, 0)).layers[first_cut - 1]
    assert moved.kind == "block"
    steps = 4.0 * len(moved.parameters)  # the step count of each parameter, fp32
    assert [received for _, received in results] == [0.0, 3 * 8.0 * moved.num_parameters + steps]
    assert all(error <= 1e-9 for error, _ in results)


def test_a_run_goes_on_under_other_degrees_from_what_the_ranks_hold(rank_pools):
    pool = rank_pools(4)
    before = prepare(Case("1f1b", 2, 4, degrees={"dp": 2, "zero": 1}, **SIZES), pool.next_number())
    after = prepare(Case("zb-h1", 4, 8, **SIZES), pool.next_number())
    assert all(error <= 1e-9 for error, _ in pool.run("live_move", (before, after)))
