"""TeraPipe and Seq1F1B with equal slices (systems.md O13, O14)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import encode
from stagewright.planner.schedules.slicing import context_exchange
from stagewright.planner.simulation.network import Shares
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate
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


def test_thirty_two_slices_hold_little_more_than_one_microbatch() -> None:
    """SlimPipe: 1 + (D - 1) / K microbatches on the first rank."""
    assert timed("seq1f1b", 4, 8, slices=32).peaks.max() == pytest.approx(1 + 3 / 32)


def test_exchanging_context_gives_every_rank_the_mean_and_shortens_the_step() -> None:
    """SlimPipe: causal slices of equal length take longer the later they come; equalised they fill the pipeline evenly."""
    causal = (np.arange(8) + 0.5) / 32  # shares of a microbatch, attention alone
    moves = context_exchange(causal[[7, 5, 2, 0]])
    after = causal[[7, 5, 2, 0]].copy()
    for giver, taker, amount in moves:
        after[giver] -= amount
        after[taker] += amount
    assert after == pytest.approx(np.full(4, after.mean()))
    above = causal[[7, 5, 2, 0]] - after.mean()
    assert sum(amount for _, _, amount in moves) == pytest.approx(above[above > 0].sum())
    assert len(moves) < 4
    schedule = generate("seq1f1b", ScheduleRequest(4, 4, num_slices=8))
    apart = simulate(schedule, StageCosts.uniform(4), shares=Shares(slice_time=causal)).makespan_s
    together = simulate(schedule, StageCosts.uniform(4)).makespan_s
    assert together < apart


def test_slices_with_split_backwards_run_in_the_same_representation() -> None:
    """MEPipe: slices of 1F1B with input and weight gradients apart; the input gradient leaves earlier."""
    whole = generate("seq1f1b", ScheduleRequest(4, 6, num_slices=4))
    orders = []
    for rank in range(4):
        steps: list[Action] = []
        for (action,) in whole.actions(rank):
            parts = [Kind.I, Kind.W] if action.kind is Kind.B else [action.kind]
            steps += [action.with_kind(kind) for kind in parts]
        orders.append(encode(steps))
    split = replace(whole, name="custom", orders=tuple(orders))
    validate(split)
    assert simulate(split, StageCosts.uniform(4)).makespan_s < simulate(whole, StageCosts.uniform(4)).makespan_s
