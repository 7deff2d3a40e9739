"""ZB-H1, ZB-H2, the automatic order, interleaved zero bubble and ZB-V (systems.md O8 to O11)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.list_scheduling import Words, chains_of, measure, peak_held
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import loop_placement
from stagewright.planner.schedules.zb_order_ilp import solve_order
from tests.planner.schedules.timed import sizes, timed

UNEQUAL = (1.0, 1.2, 0.8)
CONSTRUCTED = {"effort": 0}


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "unit", "unequal"), [(4, 8, 3, 4.2), (8, 16, 7, 9.8)])
def test_zb_h1_bubble_and_peak(num_ranks: int, num_microbatches: int, unit: float, unequal: float) -> None:
    result = timed("zb-h1", num_ranks, num_microbatches)
    assert result.makespan_s == pytest.approx(3 * num_microbatches + unit)
    assert result.peaks.tolist() == [num_ranks] * num_ranks
    assert timed("zb-h1", num_ranks, num_microbatches, UNEQUAL).makespan_s == pytest.approx(
        3 * num_microbatches + unequal
    )


def test_zb_h1_at_four_ranks_has_a_bubble_of_one_ninth() -> None:
    assert timed("zb-h1", 4, 8).timeline.bubble_over_total == pytest.approx(1 / 9)
    assert timed("1f1b", 4, 8).makespan_s - 24 == pytest.approx(9)
    assert timed("1f1b", 8, 16).makespan_s - 48 == pytest.approx(21)


def test_zb_h2_has_no_bubble_in_its_span() -> None:
    result = timed("zb-h2", 4, 8)
    assert result.timeline.longest_span_s == pytest.approx(24)
    assert result.makespan_s == pytest.approx(27)
    assert result.peaks.max() == 7
    assert timed("zb-h2", 4, 8, UNEQUAL).span_bubble_s == pytest.approx(1.8)


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "bubble"), [(4, 8, 1.2), (8, 16, 2.8)])
def test_zb_v_has_no_bubble_in_its_span(num_ranks: int, num_microbatches: int, bubble: float) -> None:
    result = timed("zb-v", num_ranks, num_microbatches)
    assert result.span_bubble_s == pytest.approx(0, abs=1e-9)
    assert result.peaks.tolist() == [num_ranks] * num_ranks
    assert timed("zb-v", num_ranks, num_microbatches, UNEQUAL).span_bubble_s <= bubble + 1e-9


def check_constructed(num_ranks: int, num_microbatches: int) -> None:
    unit_s = 3 * num_microbatches
    if num_microbatches >= num_ranks:
        for seconds, bubble in (((1.0, 1.0, 1.0), 1.0), (UNEQUAL, 1.4)):
            result = timed("zb-h1", num_ranks, num_microbatches, seconds, parameters=CONSTRUCTED)
            assert result.makespan_s == pytest.approx(unit_s + (num_ranks - 1) * bubble)
            assert result.peaks.tolist() == [num_ranks] * num_ranks
    if num_microbatches >= 2 * num_ranks - 1:
        result = timed("zb-h2", num_ranks, num_microbatches, parameters=CONSTRUCTED)
        assert result.makespan_s == pytest.approx(unit_s + num_ranks - 1)
        assert result.span_bubble_s == pytest.approx(0, abs=1e-9)
        assert result.peaks.max() == 2 * num_ranks - 1
        unequal = timed("zb-h2", num_ranks, num_microbatches, UNEQUAL, parameters=CONSTRUCTED)
        assert unequal.span_bubble_s == pytest.approx((num_ranks - 1) * 0.6)
    if num_microbatches >= 2 * num_ranks:
        result = timed("zb-v", num_ranks, num_microbatches, parameters=CONSTRUCTED)
        assert result.span_bubble_s == pytest.approx(0, abs=1e-9)
        assert result.makespan_s == pytest.approx(unit_s + (num_ranks - 1) / 2)
        assert result.peaks.tolist() == [num_ranks] * num_ranks
    if num_microbatches % num_ranks == 0:
        for chunks in (2, 3):
            result = timed("interleaved-zb", num_ranks, num_microbatches, chunks=chunks, parameters=CONSTRUCTED)
            assert result.makespan_s == pytest.approx(unit_s + (num_ranks - 1) / chunks)
            assert result.peaks == pytest.approx(num_ranks)


def test_zero_bubble_orders_meet_their_formulas() -> None:
    for num_ranks, num_microbatches in sizes(thin=True):
        check_constructed(num_ranks, num_microbatches)


@pytest.mark.soak
def test_zero_bubble_orders_meet_their_formulas_everywhere() -> None:
    for num_ranks, num_microbatches in sizes(thin=False):
        check_constructed(num_ranks, num_microbatches)


@pytest.mark.soak
def test_zb_v_with_unequal_times_stays_within_its_bubble_everywhere() -> None:
    for num_ranks, num_microbatches in sizes(thin=True):
        if num_microbatches >= 2 * num_ranks:
            result = timed("zb-v", num_ranks, num_microbatches, UNEQUAL)
            assert result.span_bubble_s <= (num_ranks - 1) * 0.4 + 1e-9


def test_effort_never_lengthens_an_order() -> None:
    for name in ("zb-h1", "zb-h2", "zb-v", "interleaved-zb", "v-half", "v-min", "1f1b-v", "zb-auto"):
        values = []
        for effort in (0, 1):
            result = timed(name, 4, 8, (10.0, 12.0, 8.0), 1.0, parameters={"effort": effort})
            values.append(result.makespan_s + result.timeline.longest_span_s)
        assert values[1] <= values[0] + 1e-9, name


def test_the_same_request_gives_the_same_orders() -> None:
    for name in ("zb-auto", "zb-v", "v-half", "chimera"):
        first, second = (timed(name, 4, 8, (10.0, 12.0, 8.0), 1.0).schedule for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first.orders, second.orders, strict=True)), name


def test_zb_h2_needs_its_warm_up() -> None:
    with pytest.raises(InvalidArgument, match="2 D - 1 = 7 microbatches on 4 ranks, 6 were asked for"):
        generate("zb-h2", ScheduleRequest(4, 6))


@pytest.mark.parametrize("seed", range(6))
def test_the_automatic_order_is_no_worse_than_the_drawn_ones_at_their_memory(seed: int) -> None:
    draw = np.random.default_rng(seed)
    num_ranks = int(draw.integers(2, 6))
    num_microbatches = int(draw.integers(2 * num_ranks, 4 * num_ranks))
    seconds = tuple(float(x) for x in draw.uniform(0.5, 1.5, 3))
    latency_s = float(draw.choice([0.0, 0.2]))
    for name, cap in (("zb-h1", num_ranks), ("zb-h2", 2 * num_ranks - 1)):
        drawn = timed(name, num_ranks, num_microbatches, seconds, latency_s)
        free = timed("zb-auto", num_ranks, num_microbatches, seconds, latency_s, memory_cap=float(cap))
        assert free.peaks.max() <= cap + 1e-9
        value, drawn_value = (r.makespan_s + 0.5 * r.timeline.longest_span_s for r in (free, drawn))
        assert value <= drawn_value * 1.001


def test_a_cap_below_one_microbatch_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"the memory cap is 0.5, one microbatch on one rank holds 1"):
        timed("zb-auto", 4, 8, memory_cap=0.5)


@pytest.mark.parametrize(("seconds", "cap"), [((1.0, 1.3, 0.7), 3), ((1.0, 1.3, 0.7), 2), ((2.0, 1.0, 1.5), 1)])
def test_the_integer_programme_finds_the_brute_force_optimum(seconds: tuple[float, float, float], cap: int) -> None:
    """Two ranks, three microbatches, latency 0.2: all 42 x 42 pairs of orders."""
    costs = StageCosts.uniform(2, forward_s=seconds[0], input_grad_s=seconds[1], weight_grad_s=seconds[2])
    chains = chains_of(loop_placement(2), costs, 3, latency_s=0.2)
    words = [np.array(word, dtype=np.int32) for word in _orders_of_three()]
    assert len(words) == 42
    offset = np.array([0, 9, 18])
    best_s = np.inf
    for first, second in itertools.product(words, repeat=2):
        pair = Words(np.concatenate([2 * first, 2 * second + 1]), offset)
        if (peak_held(chains, pair) <= cap).all():
            best_s = min(best_s, measure(chains, pair).makespan_s)
    solved = solve_order(chains, np.full(2, float(cap)), most_s=100.0)
    assert solved is not None
    assert (peak_held(chains, solved) <= cap).all()
    assert measure(chains, solved).makespan_s == pytest.approx(best_s)
    automatic = timed("zb-auto", 2, 3, seconds, 0.2, memory_cap=float(cap))
    assert automatic.makespan_s == pytest.approx(best_s)


def _orders_of_three() -> list[list[int]]:
    orders: list[list[int]] = []

    def extend(order: list[int], done: tuple[int, int, int]) -> None:
        if len(order) == 9:
            orders.append(order)
            return
        for kind in range(3):
            if done[kind] < (3 if kind == 0 else done[kind - 1]):
                extend([*order, kind], tuple(n + (k == kind) for k, n in enumerate(done)))  # type: ignore[arg-type]

    extend([], (0, 0, 0))
    return orders
