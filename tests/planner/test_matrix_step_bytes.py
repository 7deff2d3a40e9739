"""What a step of Muon or Shampoo holds for a time, by hand."""

from __future__ import annotations

from math import inf

import pytest

from stagewright.planner.cost.matrix_optimizer import newton_schulz_elements, shampoo_step_bytes
from stagewright.planner.documents import Degrees, LayerClass, Optimizer, WeightTensor
from stagewright.planner.matrix_step_bytes import (
    SteppedBucket,
    SteppedTensor,
    matrix_step_bytes,
    stepped_part,
    stepped_tensors,
)
from stagewright.planner.tile_shards import OwnedTensor
from stagewright.testing import profile_factory

MATRIX, VECTOR = SteppedTensor(200.0, rows=10, columns=20, count=1), SteppedTensor(500.0)
ITERATED = 4 * 200 + 100  # X, a X, B X and their sum, and A of 10 x 10


def need(optimizer: str, precision: str, *tensors: SteppedTensor, is_cpu: bool = False, **bucket: object) -> float:
    whole = {"owned": inf, "num_shards": 1, "is_even": True, **bucket}
    return matrix_step_bytes(Optimizer.standard(optimizer, precision), [SteppedBucket(tensors, **whole)], is_cpu=is_cpu)


def test_newton_schulz_holds_the_most_where_a_matrix_is_thin_behind_its_products_and_where_it_is_square_within_them():
    assert newton_schulz_elements(10, 20) == newton_schulz_elements(20, 10) == ITERATED
    assert newton_schulz_elements(10, 10) == 6 * 100
    assert newton_schulz_elements(10, 20, 3) == 3 * ITERATED


def root(size: int, width: int) -> int:
    return (3 * size * size + 7 * size) * width + 5 * size * 4


def test_shampoo_holds_two_products_of_a_tile_or_what_makes_a_root_of_its_larger_statistic():
    assert shampoo_step_bytes(100, 200, 8) == root(200, 8)
    assert shampoo_step_bytes(200, 100, 4) == root(200, 4)
    assert shampoo_step_bytes(2048, 1024, 4) == shampoo_step_bytes(1024, 1024, 4) == root(1024, 4) > 4 * 2 * 1024**2


def test_what_is_stepped_of_a_matrix_that_is_cut_is_its_bands():
    """A stack of two matrices of 1,500 x 40: of the band of 476 rows alone, or of both bands of one."""
    low = OwnedTensor((2, 1500, 40), is_matrix=True, first=1024 * 40, count=476 * 40)
    assert stepped_part(low) == SteppedTensor(476 * 40, 476, 40, 1)
    both = OwnedTensor((2, 1500, 40), is_matrix=True, first=1500 * 40, count=1500 * 40)
    assert stepped_part(both) == SteppedTensor(1500 * 40, 1024, 40, 1)
    assert stepped_part(OwnedTensor((7, 9), is_matrix=False, first=3, count=10)) == SteppedTensor(10)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", 2 * (200 + ITERATED)),  # the momentum in bf16
        ("fp64", 8 * ITERATED),  # where it lies
        ("bf16", 2 * (200 + ITERATED)),
    ],
)
def test_muon_holds_what_the_iteration_of_its_largest_matrix_needs(precision, expected):
    assert need("muon", precision, MATRIX, SteppedTensor(50.0, 5, 10, 1)) == expected


@pytest.mark.parametrize(("precision", "expected"), [("fp32", 2 * 200 + 4 * ITERATED), ("fp64", 8 * ITERATED)])
def test_muon_iterates_in_four_bytes_at_least_on_processors(precision, expected):
    assert need("muon", precision, MATRIX, is_cpu=True) == expected


def test_muon_widens_what_is_no_matrix_for_its_size_and_its_step():
    assert need("muon", "fp32", VECTOR) == 2 * 500
    assert need("muon", "fp32", VECTOR, is_cpu=True) == (2 + 4) * 500
    assert need("muon", "bf16", VECTOR) == (2 + 4) * 500
    assert need("muon", "fp64", VECTOR) == 0


def test_muon_gathers_a_bucket_before_it_steps_its_matrices():
    shards = {"owned": 400.0, "num_shards": 2}
    assert need("muon", "fp32", MATRIX, VECTOR, **shards) == 2 * (800 + ITERATED)
    many = {"owned": 4000.0, "num_shards": 2}
    assert need("muon", "fp32", MATRIX, **many) == 2 * (4000 + 8000)
    assert need("muon", "fp32", MATRIX, **many, is_cpu=True) == 2 * (4000 + 8000 + 8000)  # gloo's copy
    assert need("muon", "fp32", MATRIX, **{**many, "is_even": False}, is_cpu=True) == 2 * (4000 + 8000)


def test_muon_joins_a_split_matrix_before_it_steps_it():
    half = SteppedTensor(100.0, rows=10, columns=20, count=1)
    assert need("muon", "fp32", half) == 2 * (200 + ITERATED)
    assert need("muon", "fp64", half) == 8 * (200 + ITERATED)


@pytest.mark.parametrize(("precision", "copies", "width"), [("fp32", 1, 4), ("fp64", 1, 8), ("bf16", 2, 4)])
def test_shampoo_holds_a_direction_and_what_turns_it(precision, copies, width):
    assert need("shampoo", precision, MATRIX) == width * copies * 200 + root(20, width)
    assert need("shampoo", precision, VECTOR) == width * copies * 500
    assert need("shampoo", precision, VECTOR, owned=100.0, num_shards=5) == width * copies * 100


@pytest.mark.parametrize(("precision", "gradient", "width"), [("fp32", 4, 4), ("fp64", 8, 8), ("bf16", 2, 4)])
def test_shampoo_joins_the_gradient_of_a_split_matrix_and_scatters_its_direction(precision, gradient, width):
    half = SteppedTensor(100.0, rows=10, columns=20, count=1)
    turning = (gradient + width) * 200 + root(20, width)
    assert need("shampoo", precision, half) == width * 100 + max(turning, width * (2 * 200 + 100))
    quarter = need("shampoo", precision, half, owned=50.0, num_shards=2)
    assert quarter == width * 50 + (gradient + width) * 100 + root(20, width)


def test_tensors_of_a_layer_are_divided_by_the_degrees_that_divide_them():
    (known,) = profile_factory(1, forward_s=1e-3, parameters=1).classes.values()
    matrix = WeightTensor(shape=(8, 4), count=2, is_matrix=True)
    experts = WeightTensor(shape=(4, 6, 5), is_matrix=True, of_experts=True)
    numbers = {
        "parameters": 64 + 120 + 8,
        "expert_parameters": 120,
        "tensors": (matrix, experts, WeightTensor(shape=(8,))),
    }
    layer = LayerClass(kind="block", costs=known.costs, **numbers)
    dense, own = stepped_tensors(layer, Degrees(tp=2, dp=2, ep=2), 40.0)
    assert dense == (SteppedTensor(16.0, 8, 4, 1), SteppedTensor(8.0))
    assert own == (SteppedTensor(60.0, 6, 5, 2),)
    together, none = stepped_tensors(layer, Degrees(dp=2), 72.0)
    assert together == (SteppedTensor(32.0, 8, 4, 1), SteppedTensor(120.0, 6, 5, 4), SteppedTensor(8.0))
    assert none == ()
