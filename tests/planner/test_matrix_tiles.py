"""Where shards of neighbouring tensors begin when no tile of a matrix is cut."""

from __future__ import annotations

import math
import random
from itertools import pairwise

from stagewright.planner.cost.matrix_optimizer import BLOCK
from stagewright.planner.matrix_tiles import band_bounds, num_tiles, tile_sizes, tiles


def test_shards_of_a_bucket_begin_at_the_nearest_bands():
    """The picture of the module: a vector of 600, a matrix of three bands, one of a single band; width 1."""
    vector, three, one = ((600,), 0), ((3 * BLOCK, 1), BLOCK), ((600, 1), BLOCK)
    assert band_bounds((vector, three, one), (1 / 3,) * 3) == (0, 600 + BLOCK, 600 + 2 * BLOCK, 1200 + 3 * BLOCK)
    assert band_bounds((vector,), (1 / 3,) * 3) == (0, 200, 400, 600)
    assert band_bounds((one,), (0.5, 0.5)) == (0, 0, 600)  # the first has nothing
    assert band_bounds((one, one), (0.25, 0.75)) == (0, 0, 1200)
    assert band_bounds((vector, one), (0.75, 0.25)) == (0, 600, 1200)
    assert band_bounds((((3 * BLOCK, 1), 3 * BLOCK),), (0.4, 0.6)) == (0, 0, 3 * BLOCK)  # its rows belong together


def test_no_tile_of_any_bucket_is_cut_and_every_element_has_an_owner():
    rng = random.Random(0)
    for _ in range(200):
        tensors = [
            ((rng.randint(1, 3000), rng.randint(1, 40)), BLOCK) if rng.random() < 0.6 else ((rng.randint(1, 5000),), 0)
            for _ in range(rng.randint(1, 6))
        ]
        count = rng.randint(1, 5)
        bounds = band_bounds(tensors, (1 / count,) * count)
        assert len(bounds) == count + 1
        assert bounds[0] == 0
        assert bounds[-1] == sum(math.prod(shape) for shape, _ in tensors)
        assert list(bounds) == sorted(bounds)
        offset = 0
        for shape, rows in tensors:
            inside = [bound - offset for bound in bounds if offset < bound < offset + math.prod(shape)]
            assert not rows or all(cut % (BLOCK * shape[1]) == 0 for cut in inside)
            offset += math.prod(shape)


def test_sizes_of_tiles_are_those_of_the_tiles_between_any_two_bands():
    for shape in ((2500, 1500), (2, 1500, 40), (3, 7, 2048), (1024, 1024)):
        count, width = math.prod(shape), shape[-1]
        begins = sorted({tile.rows.start * width for tile in tiles(shape, 0, count)} | {count})
        for first, end in pairwise(begins):
            for other in (end, count):
                found = tile_sizes(shape, first, other - first)
                each = [
                    (t.rows.stop - t.rows.start, t.columns.stop - t.columns.start)
                    for t in tiles(shape, first, other - first)
                ]
                assert sorted(found.elements()) == sorted(each)
        assert sum(tile_sizes(shape, 0, count).values()) == num_tiles(shape)
