"""V-Half, V-Min and 1F1B-V, and the building blocks they repeat (systems.md O21)."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.schedules.building_block import repeat, v_blocks
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.list_scheduling import chains_of, measure
from stagewright.planner.schedules.one_f_one_b_v import v_slots
from stagewright.planner.schedules.schedule import wave_placement
from tests.planner.schedules.timed import sizes, timed

V_MIN, V_HALF, V_ZB = (1, 1, 1, 1), (1, 2, 1, 2), (2, 4, 2, 4)
CONSTRUCTED = {"effort": 0}


@pytest.mark.parametrize(
    ("offsets", "num_ranks", "peak", "bubble"),
    [
        (V_MIN, 4, 2, 5.5), (V_MIN, 6, 3, 10.0), (V_MIN, 8, 4, 13.5),
        (V_HALF, 4, 3, 5.0), (V_HALF, 6, 4, 8.5), (V_HALF, 8, 5, 12.0),
        (V_ZB, 4, 4, 2.5), (V_ZB, 6, 6, 4.5), (V_ZB, 8, 8, 6.5),
    ],
)  # fmt: skip
def test_repeated_blocks_have_the_published_peak_and_bubble(
    offsets: tuple[int, int, int, int], num_ranks: int, peak: int, bubble: float
) -> None:
    """The bare block, repeated 6 D times and shifted left, before anything is placed by cost."""
    costs = StageCosts.uniform(2 * num_ranks, num_chunks=2)
    chains = chains_of(wave_placement(num_ranks), costs, 6 * num_ranks)
    blocks = v_blocks(num_ranks, offsets)
    assert {block.peak_chunks for block in blocks} == {2 * peak}
    spans = [measure(chains, repeat(chains, block.slots, 6 * num_ranks, 3)).longest_span_s for block in blocks]
    assert min(spans) - 18 * num_ranks == pytest.approx(bubble)


def test_the_published_turn_gaps_are_among_the_blocks() -> None:
    assert (1, 1, 1) in {block.gaps for block in v_blocks(4, V_MIN)}
    assert (3, 1, 3) in {block.gaps for block in v_blocks(6, V_MIN)}
    assert (4, 1, 5) in {block.gaps for block in v_blocks(8, V_HALF)}


@pytest.mark.parametrize(
    ("name", "num_ranks", "peak", "bubble"),
    [
        ("v-min", 4, 2, 5.5), ("v-min", 6, 3, 10.0), ("v-min", 8, 4, 13.5),
        ("v-half", 4, 3, 5.0), ("v-half", 6, 4, 8.5), ("v-half", 8, 5, 12.0),
        ("v-zb", 4, 4, 2.5), ("v-zb", 6, 6, 4.5), ("v-zb", 8, 8, 6.5),
    ],
)  # fmt: skip
def test_families_meet_the_peak_and_do_not_exceed_the_bubble(
    name: str, num_ranks: int, peak: int, bubble: float
) -> None:
    result = timed(name, num_ranks, 6 * num_ranks)
    assert result.peaks.max() == peak
    assert result.span_bubble_s <= bubble + 1e-9


def check_memory(num_ranks: int, num_microbatches: int) -> None:
    """Peaks are equalities once the pipeline is full; the published rates 2 D / (3 T) and D / (2 T) bound the bubble."""
    for name, peak, slots in (
        ("v-min", (num_ranks + 4) // 3, 2 * num_ranks),
        ("v-half", (num_ranks + 2) // 2, 1.5 * num_ranks),
    ):
        result = timed(name, num_ranks, num_microbatches, parameters=CONSTRUCTED)
        assert result.peaks.max() <= peak + 1e-9
        if num_microbatches >= 2 * num_ranks:
            assert result.peaks.max() == peak
            assert result.span_bubble_s <= slots + 1e-9
    if num_microbatches >= 2 * num_ranks:
        result = timed("1f1b-v", num_ranks, num_microbatches, parameters=CONSTRUCTED)
        assert result.peaks.max() <= -(-3 * num_ranks // 4) + 0.5


def test_memory_and_bubble_meet_their_formulas() -> None:
    for num_ranks, num_microbatches in sizes(thin=True):
        check_memory(num_ranks, num_microbatches)


@pytest.mark.soak
def test_memory_and_bubble_meet_their_formulas_everywhere() -> None:
    for num_ranks, num_microbatches in sizes(thin=False):
        check_memory(num_ranks, num_microbatches)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7, 8])
def test_blocks_of_full_backwards_tile_every_rank(num_ranks: int) -> None:
    for slots in v_slots(num_ranks):
        for rank in range(num_ranks):
            up = 2 * num_ranks - 1 - rank
            starts = [slots[0, rank], slots[0, up], slots[1, up], slots[1, up] + 1, slots[1, rank], slots[1, rank] + 1]
            assert sorted(int(start) % 6 for start in starts) == list(range(6))
        assert (np.diff(slots[0]) >= 1).all()
        assert (np.diff(slots[1][::-1]) >= 2).all()


def test_costs_that_differ_are_answered() -> None:
    """With 10 / 12 / 8 and latency 1 the bare V-Min block is worse than 1F1B at D = 4, T = 8; placed by cost it is not."""
    seconds = (10.0, 12.0, 8.0)
    bare = timed("v-min", 4, 8, seconds, 1.0, parameters=CONSTRUCTED).makespan_s
    placed = timed("v-min", 4, 8, seconds, 1.0)
    assert placed.makespan_s < bare
    assert placed.peaks.max() == 2
