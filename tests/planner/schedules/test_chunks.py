"""Interleaved, breadth-first and wave pipelines against their closed forms (systems.md O3, O4, O12)."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.simulation.validate import validate
from tests.planner.schedules.timed import sizes, timed

EQUAL_BACKWARD = (1.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "chunks", "bubble", "peaks"),
    [
        (4, 8, 2, 3 / 19, [5.5, 4.5, 3.5, 2.5]),
        (4, 4, 2, 3 / 11, [4.0, 4.0, 3.5, 2.5]),
        (8, 16, 4, 7 / 71, [9.75, 9.25, 8.75, 8.25, 7.75, 7.25, 6.75, 6.25]),
    ],
)
def test_interleaved_meets_the_published_bubble_and_peaks(
    num_ranks: int, num_microbatches: int, chunks: int, bubble: float, peaks: list[float]
) -> None:
    result = timed("interleaved", num_ranks, num_microbatches, chunks=chunks)
    assert result.timeline.bubble_over_total == pytest.approx(bubble)
    assert result.timeline.bubble_over_ideal == pytest.approx((num_ranks - 1) / (chunks * num_microbatches))
    assert result.peaks.tolist() == pytest.approx(peaks)


def check_chunks(num_ranks: int, num_microbatches: int, chunks: int) -> None:
    makespan_s = 3 * num_microbatches + 3 * (num_ranks - 1) / chunks
    if num_microbatches % num_ranks == 0:
        result = timed("interleaved", num_ranks, num_microbatches, chunks=chunks)
        assert result.makespan_s == pytest.approx(makespan_s)
        from_end = num_ranks - 1 - np.arange(num_ranks)
        units = np.minimum(num_microbatches * chunks, 2 * from_end + (chunks - 1) * num_ranks + 1)
        assert result.peaks == pytest.approx(units / chunks)
    if num_microbatches >= num_ranks:
        result = timed("breadth-first", num_ranks, num_microbatches, chunks=chunks)
        assert result.makespan_s == pytest.approx(makespan_s)
        assert result.peaks == pytest.approx(num_microbatches)


def check_waves(num_ranks: int, num_microbatches: int, waves: int) -> None:
    if num_microbatches % num_ranks == 0:
        result = timed("wave", num_ranks, num_microbatches, EQUAL_BACKWARD, waves=waves)
        bubble = (num_ranks - 1) / (2 * waves * num_microbatches + num_ranks - 1)
        assert result.timeline.bubble_over_total == pytest.approx(bubble)
        assert (result.peaks <= num_ranks + 1e-9).all()


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved_and_breadth_first_meet_makespan_and_peak(chunks: int) -> None:
    for num_ranks, num_microbatches in sizes(thin=True):
        check_chunks(num_ranks, num_microbatches, chunks)


@pytest.mark.parametrize("waves", [1, 2, 4])
def test_waves_meet_the_bubble(waves: int) -> None:
    for num_ranks, num_microbatches in sizes(thin=True):
        check_waves(num_ranks, num_microbatches, waves)


@pytest.mark.soak
def test_chunked_pipelines_meet_their_formulas_everywhere() -> None:
    for num_ranks, num_microbatches in sizes(thin=False):
        for count in (2, 3, 4):
            check_chunks(num_ranks, num_microbatches, count)
            check_waves(num_ranks, num_microbatches, count)


def test_breadth_first_meets_the_published_numbers() -> None:
    result = timed("breadth-first", 4, 8, chunks=2)
    assert result.timeline.bubble_over_total == pytest.approx(3 / 19)
    assert result.peaks.tolist() == [8, 8, 8, 8]


def test_breadth_first_runs_each_chunk_once_in_each_direction() -> None:
    """So a chunk's parameters are gathered twice an iteration, where interleaving goes back and forth T / D times."""
    schedule = generate("breadth-first", ScheduleRequest(4, 8, num_chunks=3))
    for order in schedule.orders:
        assert np.count_nonzero(np.diff(order[:, 2])) == 4  # 3 chunks down, 3 up, the last one stays


@pytest.mark.parametrize(("waves", "bubble"), [(1, 3 / 11), (2, 3 / 19), (4, 3 / 35)])
def test_waves_with_equal_backward(waves: int, bubble: float) -> None:
    assert timed("wave", 4, 4, EQUAL_BACKWARD, waves=waves).timeline.bubble_over_total == pytest.approx(bubble)


@pytest.mark.parametrize(("waves", "bubble"), [(1, 0.333), (2, 0.213), (4, 0.119)])
def test_waves_with_twice_the_backward(waves: int, bubble: float) -> None:
    assert timed("wave", 4, 4, waves=waves).timeline.bubble_over_total == pytest.approx(bubble, abs=5e-4)


def test_a_wave_turns_around_without_a_message() -> None:
    placement = generate("hanayo", ScheduleRequest(4, 4, num_waves=2)).placement[0]
    assert placement.tolist() == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3, 3, 2, 1, 0]
    assert np.count_nonzero(np.diff(placement)) == 2 * 2 * (4 - 1)


def test_interleaving_needs_a_multiple_of_the_ranks() -> None:
    with pytest.raises(InvalidArgument, match=r"multiple of 4 microbatches \(4 ranks\), 6 is not") as refusal:
        generate("interleaved", ScheduleRequest(4, 6))
    assert refusal.value.hint == "take 4 or 8 microbatches"


def test_torchs_variant_takes_what_divides_into_its_rounds() -> None:
    torch = {"variant": "torch"}
    for num_ranks, num_microbatches in [(4, 6), (4, 2), (4, 10), (3, 7)]:
        request = ScheduleRequest(num_ranks, num_microbatches, parameters=torch)
        if num_microbatches % max(1, num_microbatches // num_ranks):
            with pytest.raises(InvalidArgument, match="rounds"):
                generate("interleaved", request)
        else:
            validate(generate("interleaved", request))


def test_torchs_variant_is_megatrons_order_where_both_apply() -> None:
    one = generate("interleaved", ScheduleRequest(4, 8, num_chunks=3))
    other = generate("interleaved", ScheduleRequest(4, 8, num_chunks=3, parameters={"variant": "torch"}))
    assert [one.text(rank) for rank in range(4)] == [other.text(rank) for rank in range(4)]


def test_a_wave_needs_its_chunks_in_pairs() -> None:
    with pytest.raises(InvalidArgument, match="an even number, 3 were asked for"):
        generate("wave", ScheduleRequest(4, 4, num_chunks=3))
    with pytest.raises(InvalidArgument, match="2 waves have 4 chunks on a rank, 6 were asked for"):
        generate("wave", ScheduleRequest(4, 4, num_chunks=6, num_waves=2))
