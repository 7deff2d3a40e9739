"""Experts over groups of their own: capacity, top-1 and top-2, folded across tensor-parallel ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, prepare
from test_schedules import assert_equal_to_one_process

pytestmark = pytest.mark.ranks

EXACT = {"dropout": 0.0, "dtype": "float64"}


@pytest.mark.parametrize(("num_choices", "factor"), [(1, 1.25), (2, 0.75)])
def test_four_experts_on_four_ranks_with_a_capacity_equal_one_process(rank_pools, num_choices, factor):
    case = Case("gpipe", 1, 2, degrees={"dp": 4, "ep": 4}, num_choices=num_choices, capacity_factor=factor, **EXACT)
    assert_equal_to_one_process(rank_pools, case)


def test_as_many_choices_are_dropped_as_exceed_the_capacity_wherever_the_experts_are(rank_pools):
    pool = rank_pools(4)
    counts = []
    for degrees in ({"dp": 4}, {"dp": 4, "ep": 2}, {"dp": 4, "ep": 4}):
        case = Case("gpipe", 1, 2, degrees=degrees, num_choices=2, capacity_factor=0.75, **EXACT)
        results = pool.run("degree_cases.dropped_choices", prepare(case, pool.next_number()))
        assert all(dropped == expected > 0 for dropped, expected in results)
        counts.append([dropped for dropped, _ in results])
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("degrees", [{"dp": 4, "ep": 2}, {"dp": 4, "ep": 4}, {"dp": 4, "ep": 2, "zero": 1}], ids=str)
def test_weights_in_bf16_have_masters_that_small_steps_move_experts_like_all_others(rank_pools, degrees):
    pool = rank_pools(4)
    case = Case("gpipe", 1, 2, degrees=degrees, num_choices=2, dropout=0.0, dtype="bfloat16")
    for types, least_moved in pool.run("degree_cases.stepped_types", prepare(case, pool.next_number())):
        assert types == {"torch.float32"}
        assert least_moved > 0


FOLDED = [
    {"dp": 2, "tp": 2, "ep": 4},
    {"dp": 2, "tp": 2, "ep": 2},
    {"dp": 2, "tp": 2, "sp": True, "ep": 4},
    {"dp": 2, "tp": 2, "vocab_parallel": True, "ep": 4, "zero": 1},
    {"dp": 2, "tp": 2, "ep": 4, "zero": 3},
    {"dp": 2, "tp": 2, "ep": 2, "zero": 1},
    {"dp": 2, "cp": 2, "ep": 4},
    {"dp": 4, "etp": 2},
    {"dp": 4, "ep": 2, "etp": 2},
    {"dp": 2, "tp": 2, "ep": 2, "etp": 2, "zero": 1},
    {"dp": 2, "tp": 2, "sp": True, "etp": 2, "zero": 1},
]


@pytest.mark.parametrize("degrees", FOLDED, ids=str)
def test_experts_folded_across_the_axes_of_attention_equal_one_process(rank_pools, degrees):
    assert_equal_to_one_process(rank_pools, Case("gpipe", 1, 2, degrees=degrees, num_choices=2, **EXACT))


def test_folded_experts_in_a_pipeline_with_split_backwards_equal_one_process(rank_pools):
    degrees = {"dp": 2, "tp": 2, "ep": 4}
    assert_equal_to_one_process(rank_pools, Case("zb-h1", 2, 3, degrees=degrees, num_choices=2, **EXACT))


def both_ways(schedule: str, zero: int, **degrees: int) -> Case:
    own = {**degrees, "ep": 2, "zero": zero}
    return Case(schedule, 2, 4, degrees=own, num_choices=2, num_blocks=4, tied=False, **EXACT)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_each_pipeline_of_a_pair_divides_the_states_of_its_experts_by_itself(rank_pools, zero):
    """In gems one pipeline works behind the other: a scatter over both would wait for ever."""
    assert_equal_to_one_process(rank_pools, both_ways("gems", zero, dp=2))


@pytest.mark.soak
@pytest.mark.parametrize("schedule", ["gems", "chimera", "dualpipe"])
@pytest.mark.parametrize("degrees", [{"dp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_experts_of_every_schedule_with_two_pipelines_equal_one_process(rank_pools, schedule, degrees, zero):
    assert_equal_to_one_process(rank_pools, both_ways(schedule, zero, **degrees))
