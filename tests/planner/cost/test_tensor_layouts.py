"""Grids of tensor parallelism: formulas, crossovers, and the executed products they describe."""

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster
from stagewright.planner.cost.emulation.products import layered_summa, summa, three_axis
from stagewright.planner.cost.tensor_layouts import (
    Grid,
    GridKind,
    Product,
    chain_elements,
    exposed_decomposed_s,
    fastest_grid,
    grids,
    least_traffic_grid,
    transformer_products,
    vocabulary_pipeline_load,
)
from stagewright.planner.errors import InvalidArgument

SHAPE = Product(rows=24.0, inner=12.0, columns=36.0)


def matrices(rows=24, inner=12, columns=36):
    rng = np.random.default_rng(1)
    return rng.normal(size=(rows, inner)), rng.normal(size=(inner, columns))


@pytest.mark.parametrize("q", [1, 2, 3])
def test_summa_multiplies_and_receives_what_the_formula_says(q):
    left, right = matrices()
    output, wire = summa(left, right, q)
    np.testing.assert_allclose(output, left @ right, rtol=1e-12, atol=1e-12)
    expected = Grid(GridKind.TWO_D, q).received_elements(SHAPE)
    assert wire.received == [expected] * q * q
    assert expected == pytest.approx((q - 1) / q**2 * (SHAPE.left + SHAPE.right))


@pytest.mark.parametrize(("q", "depth"), [(2, 1), (2, 2), (2, 3), (3, 2)])
def test_tesseract_multiplies_and_receives_what_the_formula_says(q, depth):
    left, right = matrices(rows=36)
    shape = Product(36, 12, 36)
    output, wire = layered_summa(left, right, q, depth)
    np.testing.assert_allclose(output, left @ right, rtol=1e-12, atol=1e-12)
    grid = Grid(GridKind.TWO_AND_HALF_D, q, depth)
    assert wire.received == [grid.received_elements(shape)] * grid.num_devices


@pytest.mark.parametrize("q", [2, 3])
def test_three_axes_multiply_and_receive_what_the_formula_says(q):
    left, right = matrices(rows=36, inner=36)
    shape = Product(36, 36, 36)
    output, wire = three_axis(left, right, q)
    np.testing.assert_allclose(output, left @ right, rtol=1e-12, atol=1e-12)
    assert wire.received == [pytest.approx(Grid(GridKind.THREE_D, q).received_elements(shape))] * q**3


def test_a_grid_of_depth_one_is_two_dimensional():
    for q in (2, 3, 8):
        flat, deep = Grid(GridKind.TWO_D, q), Grid(GridKind.TWO_AND_HALF_D, q, 1)
        assert deep.received_elements(SHAPE) == flat.received_elements(SHAPE)
        assert deep.weight_elements(1.0) == flat.weight_elements(1.0)


def test_eight_devices_in_a_cube_receive_an_eighth_of_everything():
    assert Grid(GridKind.THREE_D, 2).received_elements(SHAPE) == (SHAPE.left + SHAPE.right + SHAPE.output) / 8


@pytest.mark.parametrize("p", [4, 16, 64])
def test_two_dimensions_win_exactly_where_the_inequality_says(p):
    q = int(p**0.5)
    hidden = 1024
    for tokens in (16, 64, 256, 1024, 4096, 65536):
        pair = [Product(tokens, hidden, hidden), Product(tokens, hidden, hidden)]
        one, two = chain_elements(pair, Grid(GridKind.ONE_D, p)), chain_elements(pair, Grid(GridKind.TWO_D, q))
        per_product = (q - 1) / q**2 * (tokens * hidden + hidden**2)
        assert two == pytest.approx(2 * per_product)
        assert (two < one) == (2 * per_product < 2 * (p - 1) / p * tokens * hidden)


def test_the_planner_prefers_one_dimension_for_few_tokens_and_a_grid_for_many():
    def best(tokens):
        return least_traffic_grid(transformer_products(tokens=tokens, hidden=4096, ffn=16384), 64).kind

    assert best(256) is GridKind.ONE_D
    assert best(65536) is not GridKind.ONE_D


def test_grids_of_a_number_of_devices():
    assert [(g.kind.value, g.side, g.depth) for g in grids(64)] == [
        ("1d", 64, 1),
        ("2.5d", 4, 4),
        ("3d", 4, 1),
        ("2d", 8, 1),
    ]
    assert [g.kind for g in grids(6)] == [GridKind.ONE_D]
    for count in (4, 8, 16, 64):
        assert all(grid.num_devices == count for grid in grids(count))


def test_grids_divide_activations_that_one_dimension_keeps_whole():
    assert Grid(GridKind.ONE_D, 64).activation_elements(640.0) == 640.0
    assert Grid(GridKind.TWO_D, 8).activation_elements(640.0) == 10.0
    assert Grid(GridKind.TWO_AND_HALF_D, 4, 4).weight_elements(640.0) == 40.0
    assert Grid(GridKind.THREE_D, 4).weight_elements(640.0) == 10.0


def test_latency_and_the_network_decide_the_fastest_grid():
    group = resolve_cluster("a100-sxm-80g:8x8").groups[0]
    small = transformer_products(tokens=128, hidden=512, ffn=2048)
    large = transformer_products(tokens=262144, hidden=8192, ffn=32768)
    assert fastest_grid(small, 64, group).kind is GridKind.ONE_D
    assert fastest_grid(large, 64, group).kind is not GridKind.ONE_D
    with pytest.raises(InvalidArgument, match="grid of 128 devices"):
        fastest_grid(small, 128, group)


def test_decomposed_collectives_hide_all_but_one_chunk():
    assert exposed_decomposed_s(1.0, 10.0, 1) == 1.0
    visible = [exposed_decomposed_s(1.0, 10.0, r) for r in (1, 2, 4, 8)]
    assert visible == [1.0, 0.5, 0.25, 0.125]
    scarce = [exposed_decomposed_s(1.0, 0.5, r) for r in (1, 2, 4, 8)]
    assert scarce == sorted(scarce, reverse=True)
    assert scarce[-1] == pytest.approx(1 - 0.5 * 7 / 8)
    with pytest.raises(InvalidArgument, match="chunks is 0"):
        exposed_decomposed_s(1.0, 1.0, 0)


def test_a_vocabulary_of_two_layers_spread_over_the_pipeline_brings_the_busiest_rank_to_the_mean():
    last, spread = vocabulary_pipeline_load(1.0, 32, 2.0, 8)
    assert last == 6.0
    assert spread == pytest.approx((32 + 2) / 8)
