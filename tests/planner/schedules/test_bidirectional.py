"""GEMS, Chimera, DualPipe and DualPipeV against their closed forms (systems.md O5, O6, O7, O15)."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.simulation.validate import validate
from tests.planner.schedules.timed import timed

EQUAL, TWICE = (1.0, 0.5, 0.5), (1.0, 1.0, 1.0)  # backward against forward


def test_gems_tends_to_its_steady_idle_share() -> None:
    assert timed("gems", 4, 2000, EQUAL).timeline.bubble_over_total == pytest.approx(3 / 5, abs=1e-3)
    assert timed("gems", 4, 2000, TWICE).timeline.bubble_over_total == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize("num_ranks", [2, 3, 5, 8, 16])
def test_gems_period_follows_the_formula_at_every_depth(num_ranks: int) -> None:
    for seconds, extra in ((EQUAL, 1.0), (TWICE, 0.5)):
        longer, shorter = (timed("gems", num_ranks, count, seconds) for count in (64, 32))
        period_s = (longer.makespan_s - shorter.makespan_s) / 32
        assert 1 - sum(seconds) / period_s == pytest.approx((num_ranks - 1) / (num_ranks + extra))
        assert (longer.peaks == 1).all()


@pytest.mark.parametrize(("num_ranks", "equal", "twice"), [(4, 1 / 5, 1 / 4), (6, 1 / 4, 4 / 13), (8, 3 / 11, 1 / 3)])
def test_chimera_with_one_basic_unit(num_ranks: int, equal: float, twice: float) -> None:
    assert timed("chimera", num_ranks, num_ranks, EQUAL).timeline.bubble_over_total == pytest.approx(equal)
    assert timed("chimera", num_ranks, num_ranks, TWICE).timeline.bubble_over_total == pytest.approx(twice)


@pytest.mark.parametrize(("num_ranks", "peaks"), [(4, [3, 4, 4, 3]), (6, [4, 5, 6, 6, 5, 4])])
def test_chimera_holds_least_at_the_ends(num_ranks: int, peaks: list[int]) -> None:
    assert timed("chimera", num_ranks, num_ranks, EQUAL).peaks.tolist() == peaks


def test_chimera_slots_by_hand() -> None:
    """With F = B = 1: 10 slots at (4, 4), 18 at (4, 8), 22 at (8, 8), 38 at (8, 16); with B = 2 F 16 at (4, 4)."""
    for num_ranks, num_microbatches, slots in ((4, 4, 10), (4, 8, 18), (8, 8, 22), (8, 16, 38)):
        assert timed("chimera", num_ranks, num_microbatches, EQUAL).makespan_s == pytest.approx(slots)
    assert timed("chimera", 4, 4, TWICE).makespan_s == pytest.approx(16)


def test_chimera_with_more_microbatches_than_ranks() -> None:
    """O6: 1/9 with equal backwards; with twice the backward 1/7, where a plain greedy merge stays at 0.1724."""
    assert timed("chimera", 4, 8, EQUAL).timeline.bubble_over_total == pytest.approx(1 / 9)
    assert timed("chimera", 4, 8, TWICE).timeline.bubble_over_total <= 1 / 7 + 1e-9
    for variant in ("concatenation", "doubling", "halving"):
        result = timed("chimera", 4, 8, TWICE, parameters={"variant": variant})
        assert result.timeline.bubble_over_total <= 1 / 7 + 1e-9, variant


@pytest.mark.parametrize("num_ranks", range(2, 17, 2))
def test_chimera_meets_its_formulas(num_ranks: int) -> None:
    for num_microbatches in range(num_ranks, 65, num_ranks):
        equal = timed("chimera", num_ranks, num_microbatches, EQUAL)
        assert equal.makespan_s == pytest.approx(2 * num_microbatches + num_ranks - 2)
        twice = timed("chimera", num_ranks, num_microbatches, TWICE)
        assert twice.makespan_s <= 3 * num_microbatches + 2 * (num_ranks - 2) + 1e-9
        assert equal.peaks.max() <= num_ranks
        doubled = twice.schedule.parameters["variant"] == "doubling"
        assert twice.peaks.max() <= num_ranks * (2 if doubled else 1)


@pytest.mark.parametrize(("num_ranks", "pairs"), [(4, 2), (8, 2), (8, 4), (12, 2), (12, 3), (16, 2), (16, 4)])
def test_more_pairs_of_replicas_leave_fewer_bubbles(num_ranks: int, pairs: int) -> None:
    for num_microbatches in range(num_ranks, 65, num_ranks):
        if num_microbatches % (2 * pairs) == 0:
            result = timed("chimera", num_ranks, num_microbatches, EQUAL, parameters={"pairs": pairs})
            ends = num_ranks / pairs - 2
            assert result.timeline.bubble_over_total == pytest.approx(ends / (2 * num_microbatches + ends))
            assert result.schedule.num_replicas == 2 * pairs


def test_forward_doubling_takes_two_microbatches_at_once() -> None:
    doubled = timed("chimera", 4, 8, TWICE, parameters={"variant": "doubling"})
    for rank in range(4):
        forwards = [a for step in doubled.schedule.actions(rank) for a in step if a.kind.name == "F"]
        assert all(x.microbatch + 2 == y.microbatch for x, y in zip(forwards[::2], forwards[1::2], strict=True))
    validate(doubled.schedule)
    validate(timed("chimera", 4, 8, TWICE, parameters={"variant": "halving"}).schedule)


def test_halving_is_taken_when_doubling_passes_the_cap() -> None:
    assert timed("chimera", 4, 8, TWICE, memory_cap=4.0).peaks.max() <= 4
    with pytest.raises(InvalidArgument, match="the cap is 2"):
        timed("chimera", 4, 8, TWICE, memory_cap=2.0)


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "parameters", "message"),
    [
        (5, 10, {}, "even number of ranks, 5 is odd"),
        (4, 7, {}, "deals its microbatches to 2 replicas, 7 is no multiple of 2"),
        (8, 8, {"pairs": 3}, "4 is no multiple of 3"),
        (4, 6, {"variant": "doubling"}, "6 is no multiple of 4"),
        (4, 8, {"variant": "tripling"}, "one of concatenation, doubling, halving"),
    ],
)
def test_chimera_states_its_rules(
    num_ranks: int, num_microbatches: int, parameters: dict[str, int | str], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        generate("chimera", ScheduleRequest(num_ranks, num_microbatches, parameters=parameters))


@pytest.mark.parametrize(("num_ranks", "fused_s", "apart_s"), [(8, 6.0, 3.0), (4, 2.0, 1.0)])
def test_dualpipe_idle_time_with_fused_and_with_separate_pairs(num_ranks: int, fused_s: float, apart_s: float) -> None:
    """O15, 20 microbatches, F = I = W = 1 and a fused pair of 3."""
    fused = timed("dualpipe", num_ranks, 20)
    assert fused.makespan_s - fused.timeline.ideal_s == pytest.approx(fused_s)
    assert fused.peaks.tolist() == [num_ranks + 1] * num_ranks
    apart = timed("dualpipe", num_ranks, 20, parameters={"fused": 0})
    assert apart.makespan_s - apart.timeline.ideal_s == pytest.approx(apart_s)


def test_dualpipe_against_1f1b_and_zb_h1() -> None:
    assert timed("1f1b", 8, 20).makespan_s - 60 == pytest.approx(21)
    assert timed("zb-h1", 8, 20).makespan_s - 60 == pytest.approx(7)


@pytest.mark.parametrize("num_ranks", range(2, 17, 2))
def test_dualpipe_meets_its_formula(num_ranks: int) -> None:
    for num_microbatches in range(2 * num_ranks, 65, 2 if num_ranks < 6 else 6):
        result = timed("dualpipe", num_ranks, num_microbatches)
        assert result.makespan_s - 3 * num_microbatches == pytest.approx((num_ranks / 2 - 1) * (3 + 2 - 3))
        assert result.peaks == pytest.approx(num_ranks + 1)


@pytest.mark.parametrize("num_ranks", range(2, 17, 2))
def test_dualpipe_v_meets_its_formula(num_ranks: int) -> None:
    for num_microbatches in range(2 * num_ranks, 65, 1 if num_ranks < 6 else 5):
        apart = timed("dualpipe-v", num_ranks, num_microbatches)
        assert apart.makespan_s - 3 * num_microbatches == pytest.approx((num_ranks - 1) * 0.5)
        assert apart.peaks == pytest.approx(num_ranks + 0.5)
        fused = timed("dualpipe-v", num_ranks, num_microbatches, parameters={"fused": 1})
        assert fused.makespan_s - 3 * num_microbatches == pytest.approx((num_ranks - 1) * 0.5 * (3 + 2 - 3))


def test_dualpipe_v_is_the_first_half_of_dualpipe() -> None:
    """Rank d of D has the kinds, in order, of DualPipe's rank d of 2 D with as many microbatches a direction."""
    whole, folded = generate("dualpipe", ScheduleRequest(8, 20)), generate("dualpipe-v", ScheduleRequest(4, 10))
    for rank in range(4):
        assert np.array_equal(whole.orders[rank][:, 0], folded.orders[rank][:, 0])


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches", "message"),
    [
        ("dualpipe", 5, 20, "even number of ranks, 5 is odd"),
        ("dualpipe", 4, 9, "even number, 9 is odd"),
        ("dualpipe", 8, 14, "at least 2 D = 16 microbatches for 8 ranks, 14 were asked for"),
        ("dualpipe-v", 4, 7, "at least 2 D = 8 microbatches for 4 ranks, 7 were asked for"),
    ],
)
def test_dualpipes_state_their_rules(name: str, num_ranks: int, num_microbatches: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        generate(name, ScheduleRequest(num_ranks, num_microbatches))
