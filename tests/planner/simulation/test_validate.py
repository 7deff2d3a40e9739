"""The validator accepts what can run and names what cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.schedule import KIND, STAGE, Schedule, encode
from stagewright.planner.simulation.kernel import compile_order
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate
from tests.planner.simulation.random_schedules import one_f_one_b, schedules


def changed(rank, change, *, microbatches=8, ranks=4):
    schedule = one_f_one_b(ranks, microbatches)
    orders = list(schedule.orders)
    orders[rank] = change(orders[rank].copy())
    return Schedule("custom", microbatches, schedule.placement, tuple(orders))


def swap(first, second):
    def change(order):
        order[[first, second]] = order[[second, first]]
        return order

    return change


def with_cell(row, column, value):
    def change(order):
        order[row, column] = value
        return order

    return change


CASES = {
    "a last backward is missing": (
        changed(1, lambda order: order[:-1]),
        ["rank 1 never runs 1B7 (or its I and W)", "[1B6]"],
    ),
    "a forward is missing": (changed(2, lambda order: order[1:]), ["rank 2, step 1: 2B0: stands before 2F0"]),
    "a weight gradient is missing": (changed(3, with_cell(1, KIND, Kind.I)), ["rank 3 never runs 3W0"]),
    "a weight gradient comes first": (
        changed(3, with_cell(1, KIND, Kind.W)),
        ["rank 3, step 1: 3W0: stands before 3I0"],
    ),
    "a backward comes first": (changed(3, swap(0, 1)), ["rank 3, step 0: 3B0: stands before 3F0", "rank 3 | [3B0]"]),
    "an action runs twice": (
        changed(0, lambda order: np.insert(order, 2, order[1], axis=0)),
        ["rank 0, step 2: 0F1: its microbatch has had it already"],
    ),
    "an action is on another rank": (
        changed(0, with_cell(0, STAGE, 1)),
        ["rank 0, step 0: 1F0: stage 1 is placed on rank 1"],
    ),
    "a stage is out of range": (changed(0, with_cell(0, STAGE, 7)), ["rank 0, step 0: stage 7 is outside"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_schedule_is_refused_by_rank_and_action(case):
    schedule, words = CASES[case]
    with pytest.raises(InvalidSchedule) as caught:
        validate(schedule)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.hint


def test_b_beside_i_and_w_is_refused():
    for kinds in ((Kind.F, Kind.B, Kind.I, Kind.W), (Kind.F, Kind.I, Kind.B, Kind.W), (Kind.F, Kind.I, Kind.W, Kind.B)):
        schedule = Schedule("custom", 1, np.array([[0]], dtype=np.int32), (encode([Action(k, 0, 0) for k in kinds]),))
        with pytest.raises(InvalidSchedule, match="has had it already"):
            validate(schedule)


def test_a_deadlock_between_ranks_is_shown_as_a_cycle():
    schedule = changed(0, swap(1, 4), ranks=2, microbatches=4)  # 0F0 0B1 0B0 0F2 0F1: rank 1 never sees microbatch 1
    with pytest.raises(InvalidSchedule, match="0B1: stands before 0F1"):
        validate(schedule)
    crossed = changed(1, swap(0, 2), ranks=2, microbatches=4)
    with pytest.raises(InvalidSchedule):
        validate(crossed)
    orders = (
        encode([Action(Kind.F, 0, 0), Action(Kind.B, 0, 0), Action(Kind.F, 0, 1), Action(Kind.B, 0, 1)]),
        encode([Action(Kind.F, 1, 1), Action(Kind.F, 1, 0), Action(Kind.B, 1, 0), Action(Kind.B, 1, 1)]),
    )
    with pytest.raises(InvalidSchedule, match="rank 0 at 0B0 waits for 1B0 of rank 1"):
        validate(Schedule("custom", 2, np.array([[0, 1]], dtype=np.int32), orders))


def test_the_cap_is_refused_at_the_action_that_exceeds_it():
    schedule = one_f_one_b(4, 8)
    validate(schedule, memory_cap=4.0)
    with pytest.raises(InvalidSchedule) as caught:
        validate(schedule, memory_cap=3.0)
    assert "rank 0, step 3: 0F3 is live activation number 4, the cap is 3" in str(caught.value)
    assert "needs 4" in (caught.value.hint or "")


def test_a_microbatch_stays_on_one_replica():
    placement = np.array([[0, 1], [1, 0]], dtype=np.int32)
    orders = (
        encode([Action(Kind.F, 0, 0), Action(Kind.B, 0, 0)]),
        encode([Action(Kind.F, 0, 0, replica=1), Action(Kind.F, 1, 0), Action(Kind.B, 1, 0)]),
    )
    with pytest.raises(InvalidSchedule, match="microbatch 0 runs on replica 0, this is replica 1"):
        validate(Schedule("custom", 1, placement, orders))
    with pytest.raises(InvalidSchedule, match="runs on replica 1"):
        validate(one_f_one_b(2, 1), assignment=np.array([1], dtype=np.int32))


def test_slices_run_forwards_in_order_and_backwards_in_reverse():
    def schedule(forward, backward, **parameters):
        steps = [Action(Kind.F, 0, 0, part) for part in forward] + [Action(Kind.B, 0, 0, part) for part in backward]
        placement = np.array([[0]], dtype=np.int32)
        return Schedule("custom", 1, placement, (encode(steps),), num_slices=2, parameters=parameters)

    validate(schedule((0, 1), (1, 0)))
    validate(schedule((0, 1), (0, 1), slice_axis="batch"))
    with pytest.raises(InvalidSchedule, match=r"rank 0, step 0: 0F0\.1: .*slice 0 has not run"):
        validate(schedule((1, 0), (1, 0)))
    with pytest.raises(InvalidSchedule, match=r"rank 0, step 2: 0B0\.0: .*slice 1 has not run"):
        validate(schedule((0, 1), (0, 1)))


def test_an_evicted_activation_must_be_back_for_its_backward():
    def schedule(*kinds):
        placement = np.array([[0]], dtype=np.int32)
        return Schedule("custom", 1, placement, (encode([Action(kind, 0, 0) for kind in kinds]), encode([])))

    validate(schedule(Kind.F, Kind.EVICT, Kind.LOAD, Kind.B))
    for kinds in (
        (Kind.F, Kind.EVICT, Kind.B),
        (Kind.F, Kind.LOAD, Kind.B),
        (Kind.EVICT, Kind.F, Kind.B),
        (Kind.F, Kind.EVICT, Kind.EVICT, Kind.LOAD, Kind.B),
    ):
        with pytest.raises(InvalidSchedule, match="be back before its backward"):
            validate(schedule(*kinds))


@given(schedules())
@settings(max_examples=100)
def test_schedules_that_ran_are_accepted_and_one_row_less_is_refused(case):
    schedule, _, rng = case
    validate(schedule)
    rank = rng.choice([r for r in range(schedule.num_ranks) if len(schedule.orders[r])])
    orders = list(schedule.orders)
    orders[rank] = np.delete(orders[rank], rng.randrange(len(orders[rank])), axis=0)
    cut = Schedule(
        "custom", schedule.num_microbatches, schedule.placement, tuple(orders), schedule.num_slices, schedule.edges
    )
    with pytest.raises(InvalidSchedule):
        validate(cut)


@given(schedules(fused=False))
@settings(max_examples=150)
def test_a_shuffled_list_is_refused_or_runs(case):
    schedule, costs, rng = case
    orders = [order.copy() for order in schedule.orders]
    for _ in range(2):
        rank = rng.choice([r for r in range(schedule.num_ranks) if len(orders[r])])
        first, second = rng.randrange(len(orders[rank])), rng.randrange(len(orders[rank]))
        orders[rank][[first, second]] = orders[rank][[second, first]]
    mixed = Schedule(
        "custom", schedule.num_microbatches, schedule.placement, tuple(orders), schedule.num_slices, schedule.edges
    )
    try:
        validate(mixed)
    except InvalidSchedule:
        return
    assert simulate(mixed, costs).makespan_s > 0
    assert compile_order(mixed).num_actions == mixed.num_actions
