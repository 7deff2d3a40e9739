"""Placement of attention blocks against every placement of small cases, and against the ring."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.block_placement import (
    Blocks,
    BlockSizes,
    Placement,
    least_volume_bytes,
    loads_of,
    place_blocks,
    ring_volume_bytes,
    volume_bytes,
    work_limit,
)

CASES = [([3], 2), ([3], 3), ([2, 2, 1], 2), ([4], 2), ([2, 2, 2], 2), ([3, 1, 1], 2), ([4, 1], 2)]


@pytest.mark.parametrize("sizes", [BlockSizes(3.0, 2.0), BlockSizes(2.0, 0.5)], ids=str)
@pytest.mark.parametrize(("lengths", "num_devices"), CASES)
def test_small_placements_have_the_least_volume_of_all_that_balance(
    lengths: list[int], num_devices: int, sizes: BlockSizes
) -> None:
    blocks = Blocks.causal(lengths, 1)
    placed = place_blocks(blocks, num_devices, sizes)
    assert volume_bytes(blocks, placed, sizes) == least_volume_bytes(blocks, num_devices, sizes)
    assert loads_of(blocks, placed, num_devices).max() <= work_limit(blocks, num_devices, 0.1)


def test_blocks_of_a_long_sequence_are_spread_and_short_sequences_stay_whole() -> None:
    """32 blocks beside 31 sequences of one: a third of the ring's bytes, at loads of at most a tenth above even."""
    blocks, sizes = Blocks.causal([32768] + [1024] * 31, 1024), BlockSizes(3.0, 2.0)
    placed = place_blocks(blocks, 8, sizes)
    assert volume_bytes(blocks, placed, sizes) < ring_volume_bytes(blocks, 8, sizes) / 3
    assert loads_of(blocks, placed, 8).max() <= 1.1 * blocks.work.sum() / 8 + 1e-9
    short = blocks.sequence[blocks.query] > 0
    assert (placed.home[blocks.query[short]] == placed.device[short]).all()


def test_a_ring_placement_receives_what_its_closed_form_says() -> None:
    """Queries at home, every key-value block used on each device: (N - 1) messages of each of them."""
    blocks, sizes = Blocks.causal([8], 1), BlockSizes(3.0, 2.0)
    every = Blocks(blocks.sequence, np.repeat(np.arange(8), 8), np.tile(np.arange(8), 8), np.ones(64))
    home = np.arange(8) % 4
    placed = Placement(home, home[every.query])
    assert volume_bytes(every, placed, sizes) == ring_volume_bytes(every, 4, sizes)
