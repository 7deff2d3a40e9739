"""Tiles of a matrix, at most BLOCK x BLOCK, and shards of neighbouring tensors that no tile is cut by.

Tensors of an optimizer that keeps statistics of whole tiles (Shampoo) lie one behind the other, and each device owns one run of their
elements. A run that would begin within a matrix begins at the nearest band of tiles instead:

    tensors      | vector |  matrix: band 0 | band 1 | band 2 |  matrix: one band  |
    equal thirds            ^ would begin here: *       and here:    *
    shards       |        |                 |                 |                    |      the ends of bands 0 and 2

so that shards of a bucket differ by up to a band, and of matrices with one band by up to a matrix.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stagewright.planner.cost.matrix_optimizer import BLOCK, tile_sides
from stagewright.planner.replica_shares import shard_bounds


@dataclass(frozen=True)
class Tile:
    """At most BLOCK x BLOCK neighbouring elements of a matrix, or of one in a stack: the `number`-th of the tensor's tiles.

    `rows` are those of all matrices of the stack, one under the other.
    """

    number: int
    rows: slice
    columns: slice


def tiles(shape: Sequence[int], first: int, count: int) -> Iterator[Tile]:
    """Yield those of a tensor's tiles that lie in `count` elements from `first` on, where bands of tiles begin and end."""
    height, width = shape[-2:]
    number = 0
    for top in range(0, math.prod(shape) // width, height):
        for upper in range(top, top + height, BLOCK):
            rows = slice(upper, min(upper + BLOCK, top + height))
            for left in range(0, width, BLOCK):
                if first <= rows.start * width < first + count:
                    yield Tile(number, rows, slice(left, min(left + BLOCK, width)))
                number += 1


def num_tiles(shape: Sequence[int]) -> int:
    """Return how many tiles a matrix has, or a stack of them."""
    height, width = shape[-2:]
    return math.prod(shape[:-2]) * -(-height // BLOCK) * -(-width // BLOCK)


def tile_sizes(shape: Sequence[int], first: int, count: int) -> Counter[tuple[int, int]]:
    """Return how many tiles of which height and width lie in `count` elements from `first` on, where bands begin and end."""
    height, width = shape[-2:]
    found: Counter[tuple[int, int]] = Counter()
    row, end = first // width, (first + count) // width
    while row < end:
        band = min(BLOCK, height - row % height)
        for side, number in tile_sides(width):
            found[band, side] += number
        row += band
    return found


def nearest_band(shape: Sequence[int], element: int, rows: int = BLOCK) -> int:
    """Return the element of a tensor nearest to another at which a band of `rows` rows of a matrix begins, or behind the last one."""
    height, width = shape[-2:]
    matrix, inside = divmod(element, height * width)
    below = inside // (rows * width) * rows * width
    above = min(below + rows * width, height * width)
    return matrix * height * width + (below if inside - below <= above - inside else above)


def band_bounds(tensors: Iterable[tuple[Sequence[int], int]], shares: Sequence[float]) -> tuple[int, ...]:
    """Return where the shards of neighbouring tensors begin, and the end of the last, [len(shares) + 1].

    `tensors` are shapes, each with the rows of its bands where it is a matrix, or a stack of them, that is cut between them only,
    and else 0.
    """
    each = [(math.prod(shape), shape, rows) for shape, rows in tensors]
    bounds = shard_bounds(sum(size for size, *_ in each), shares)
    offset, found = 0, list(bounds)
    for size, shape, rows in each:
        for place, bound in enumerate(bounds) if rows else ():
            if offset < bound < offset + size:
                found[place] = offset + nearest_band(shape, bound - offset, rows)
        offset += size
    return tuple(found)
