"""TeraPipe and Seq1F1B with equal slices (systems.md O13, O14)."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from tests.planner.schedules.timed import sizes, timed


def check(num_ranks: int, num_microbatches: int, slices: int) -> None:
    bubble = (num_ranks - 1) / (slices * num_microbatches + num_ranks - 1)
    for name in ("terapipe", "seq1f1b"):
        result = timed(name, num_ranks, num_microbatches, slices=slices)
        assert result.timeline.bubble_over_total == pytest.approx(bubble)
        in_flight = (num_ranks - np.arange(num_ranks) + slices - 1) / slices
        limit = np.minimum(num_microbatches, in_flight) if name == "seq1f1b" else num_microbatches
        assert result.peaks == pytest.approx(limit)


def test_four_slices_on_four_ranks() -> None:
    assert timed("terapipe", 4, 4, slices=4).timeline.bubble_over_total == pytest.approx(3 / 19)
    result = timed("seq1f1b", 4, 4, slices=4)
    assert result.timeline.bubble_over_total == pytest.approx(3 / 19)
    assert result.peaks.tolist() == [1.75, 1.5, 1.25, 1.0]


@pytest.mark.parametrize("slices", [1, 2, 3, 8])
def test_sliced_pipelines_meet_bubble_and_peak(slices: int) -> None:
    for num_ranks, num_microbatches in sizes(thin=True):
        check(num_ranks, num_microbatches, slices)


@pytest.mark.soak
def test_sliced_pipelines_meet_bubble_and_peak_everywhere() -> None:
    for num_ranks, num_microbatches in sizes(thin=False):
        for slices in (2, 4, 8):
            check(num_ranks, num_microbatches, slices)


@pytest.mark.parametrize(("name", "plain"), [("terapipe", "gpipe"), ("seq1f1b", "1f1b")])
def test_one_slice_is_the_whole_microbatch(name: str, plain: str) -> None:
    sliced, whole = generate(name, ScheduleRequest(4, 6)), generate(plain, ScheduleRequest(4, 6))
    assert [sliced.text(rank) for rank in range(4)] == [whole.text(rank) for rank in range(4)]


def test_a_family_without_slices_refuses_them() -> None:
    with pytest.raises(InvalidArgument, match=r"whole \(1 slice\), 4 slices were asked for"):
        generate("1f1b", ScheduleRequest(4, 4, num_slices=4))
