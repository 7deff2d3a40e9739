"""The makespan kernel against the rich simulator and the reference, and its cuts as bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.schedule import Schedule, encode
from stagewright.planner.simulation.kernel import compile_order, critical_path, critical_paths, makespan, makespans
from stagewright.planner.simulation.live import peak_live
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from tests.planner.simulation.random_schedules import gpipe, one_f_one_b, random_costs, schedules


def _times(costs):
    return costs.forward_s, costs.input_grad_s + costs.recompute_s, costs.weight_grad_s


@given(schedules())
@settings(max_examples=80)
def test_kernel_and_simulator_agree(case):
    check_kernel_and_simulator_agree(case)


@pytest.mark.soak
@given(schedules())
@settings(max_examples=1000)
def test_kernel_and_simulator_agree_at_the_full_count(case):
    check_kernel_and_simulator_agree(case)


def check_kernel_and_simulator_agree(case) -> None:
    schedule, costs, rng = case
    latency = rng.choice([0.0, 0.3, 1.0])
    tail = np.array([rng.choice([0.0, 2.0]) for _ in range(schedule.num_ranks)])
    timeline = simulate(schedule, costs, links=Links(latency_s=latency), tail_s=tail)
    order = compile_order(schedule)
    assert makespan(order, *_times(costs), latency, tail) == pytest.approx(timeline.makespan_s, rel=1e-12)
    assert order.num_actions == schedule.num_actions


@given(schedules())
@settings(max_examples=60)
def test_a_cut_is_tight_where_it_was_traced_and_a_lower_bound_elsewhere(case):
    check_a_cut_is_tight_where_it_was_traced_and_a_lower_bound_elsewhere(case)


@pytest.mark.soak
@given(schedules())
@settings(max_examples=1000)
def test_a_cut_is_tight_where_it_was_traced_and_a_lower_bound_elsewhere_at_the_full_count(case):
    check_a_cut_is_tight_where_it_was_traced_and_a_lower_bound_elsewhere(case)


def check_a_cut_is_tight_where_it_was_traced_and_a_lower_bound_elsewhere(case) -> None:
    schedule, costs, rng = case
    order = compile_order(schedule)
    tail = np.array([rng.choice([0.0, 2.0]) for _ in range(schedule.num_ranks)])
    cut = critical_path(order, *_times(costs), 0.3, tail)
    assert cut.makespan_s == makespan(order, *_times(costs), 0.3, tail)
    assert cut.value(*_times(costs), 0.3, tail) == pytest.approx(cut.makespan_s, rel=1e-12)
    for _ in range(5):
        other = _times(random_costs(rng, schedule.num_stages))
        latency = rng.choice([0.0, 0.5])
        assert cut.value(*other, latency, tail) <= makespan(order, *other, latency, tail) * (1 + 1e-12)


def test_a_batch_of_costs_gives_the_same_makespans_one_by_one():
    order = compile_order(one_f_one_b(4, 8))
    rng = np.random.default_rng(0)
    forward, inputs, weights = rng.uniform(0.5, 1.5, (3, 7, 4))
    latency, tail = rng.uniform(0, 1, 7), rng.uniform(0, 1, (7, 4))
    single = [makespan(order, forward[i], inputs[i], weights[i], latency[i], tail[i]) for i in range(7)]
    assert makespans(order, forward, inputs, weights, latency, tail).tolist() == single
    assert [cut.makespan_s for cut in critical_paths(order, forward, inputs, weights, latency, tail)] == single


def test_the_1f1b_path_goes_down_once_and_alternates():
    cut = critical_path(compile_order(one_f_one_b(4, 8)), np.ones(4), np.ones(4), np.ones(4), 0.5)
    assert cut.makespan_s == 41.0
    assert (cut.counts[0] @ np.ones(4) + cut.counts[1:].sum(), cut.hops) == (33, 16)


def test_columns_name_every_node():
    order = compile_order(one_f_one_b(2, 2))
    kind, stage = order.kind_stage()
    assert sorted(zip(kind.tolist(), stage.tolist(), strict=True))[1:] == sorted(
        [(Kind.F, s) for s in (0, 1)] * 2 + [(Kind.B, s) for s in (0, 1)] * 2
    )
    assert (order.rank[1:] == stage[1:]).all()


@given(schedules())
@settings(max_examples=40)
def test_peaks_of_any_activation_sizes_follow_from_the_live_vectors(case):
    check_peaks(case)


@pytest.mark.soak
@given(schedules())
@settings(max_examples=500)
def test_peaks_follow_from_the_live_vectors_at_the_full_count(case):
    check_peaks(case)


def check_peaks(case) -> None:
    """Hold the peaks of random activation sizes against a walk through each rank's order."""
    schedule, _, rng = case
    sizes = np.array([rng.randint(0, 5) for _ in range(schedule.num_stages)], dtype=float)
    for rank, vectors in enumerate(peak_live(schedule)):
        live, peak = 0.0, 0.0
        for row in schedule.orders[rank].tolist():
            sign = {Kind.F: 1, Kind.B: -1, Kind.W: -1}.get(Kind(row[0]), 0)
            live += sign * sizes[row[2]] * (1.0 if row[4] < 0 else 1 / schedule.num_slices)
            peak = max(peak, live)
        found = max((float(v @ sizes) / schedule.num_slices for v in vectors), default=0.0)
        assert found == pytest.approx(peak)
        for a in range(len(vectors)):
            assert not any((vectors[b] >= vectors[a]).all() for b in range(len(vectors)) if b != a)


def test_live_vectors_of_simple_orders_are_single():
    assert [v.tolist() for v in peak_live(one_f_one_b(3, 5))] == [[[3, 0, 0]], [[0, 2, 0]], [[0, 0, 1]]]
    assert [v.tolist() for v in peak_live(gpipe(2, 5))] == [[[5, 0]], [[0, 5]]]


def test_a_deadlock_is_refused_with_its_cycle():
    placement = np.array([[0, 1]], dtype=np.int32)
    orders = (
        encode([Action(Kind.F, 0, 0), Action(Kind.B, 0, 0), Action(Kind.F, 0, 1), Action(Kind.B, 0, 1)]),
        encode([Action(Kind.F, 1, 1), Action(Kind.F, 1, 0), Action(Kind.B, 1, 0), Action(Kind.B, 1, 1)]),
    )
    with pytest.raises(InvalidSchedule) as caught:
        compile_order(Schedule("custom", 2, placement, orders))
    text = str(caught.value)
    assert "rank 0 at 0B0 waits for 1B0 of rank 1 (its step 2)" in text
    assert "rank 1 at 1F1 waits for 0F1 of rank 0 (its step 2)" in text
    assert "[0B0]" in text


def test_actions_without_a_known_time_are_refused():
    steps = [Action(kind, 0, 0) for kind in (Kind.F, Kind.R, Kind.B)]
    with pytest.raises(InvalidSchedule, match="holds R actions"):
        compile_order(Schedule("custom", 1, np.array([[0]], dtype=np.int32), (encode(steps),)))
