"""BPipe, AutoPipe, DynaPipe, GraphPipe, DHelix, Tessel, PipeFisher and slice lengths: the papers' claims at small sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.bpipe import activation_cap
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.dhelix import paired_s
from stagewright.planner.schedules.dynapipe import order_under_cap, padding_waste, split_batch
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.schedules.pipefisher import filled
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, STAGE
from stagewright.planner.schedules.slicing import equal_work_slices, fastest_slices
from stagewright.planner.simulation.implied_shares import unit_factors
from stagewright.planner.simulation.network import Links, Shares
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.timeline import COMPUTE_LANE
from stagewright.planner.simulation.validate import validate


@pytest.mark.parametrize("num_ranks", range(2, 17))
def test_bpipe_holds_half_the_ranks_plus_one_everywhere_and_costs_no_time(num_ranks):
    request = ScheduleRequest(num_ranks, 3 * num_ranks)
    costs = StageCosts.uniform(num_ranks, input_grad_s=1.0, weight_grad_s=1.0)
    schedule = generate("bpipe", request)
    validate(schedule)
    timeline = simulate(schedule, costs, links=Links(peer_latency_s=0.9))
    plain = simulate(generate("1f1b", request), costs)
    assert timeline.peak_memory().max() == min(activation_cap(num_ranks), num_ranks)
    assert timeline.makespan_s == plain.makespan_s
    assert peak_activations(schedule, costs).tolist() == timeline.peak_memory().tolist()


def test_bpipe_caps_are_3_for_4_ranks_and_5_for_8():
    assert (activation_cap(4), activation_cap(8)) == (3, 5)


def test_a_slow_peer_link_makes_bpipe_longer_than_1f1b():
    costs = StageCosts.uniform(8)
    slow = simulate(generate("bpipe", ScheduleRequest(8, 24)), costs, links=Links(peer_latency_s=9.0))
    assert slow.makespan_s > simulate(generate("1f1b", ScheduleRequest(8, 24)), costs).makespan_s


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_halved_first_microbatch_halves_the_start_up(num_ranks):
    request = ScheduleRequest(num_ranks, 4 * num_ranks, parameters={"halved": 1})
    schedule = generate("autopipe", request)
    timeline = simulate(schedule, StageCosts.uniform(num_ranks))
    last = timeline.start_s[(timeline.rank == num_ranks - 1) & (timeline.lane == 0)].min()
    assert last == (num_ranks - 1) / 2
    assert unit_factors(schedule.num_microbatches, 1).sum() == request.num_microbatches


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6])
def test_the_slicer_never_loses_to_1f1b(num_ranks):
    request = ScheduleRequest(num_ranks, 2 * num_ranks)
    costs = StageCosts.uniform(num_ranks)
    sliced = simulate(generate("autopipe", request), costs).makespan_s
    assert sliced <= simulate(generate("1f1b", request), costs).makespan_s


def test_graphpipe_bubbles_by_depth_not_by_stages():
    edges = ((0, 1), (1, 4), (2, 3), (3, 4))
    schedule = generate("graphpipe", ScheduleRequest(5, 4, edges=edges))
    validate(schedule)
    timeline = simulate(schedule, StageCosts.uniform(5))
    chain = simulate(generate("1f1b", ScheduleRequest(5, 4)), StageCosts.uniform(5))
    assert timeline.bubble_over_total == pytest.approx(1 / 3)
    assert chain.bubble_over_total == pytest.approx(1 / 2)
    assert timeline.peak_memory().tolist() == [3, 2, 3, 2, 1]


def test_distmm_starts_no_backward_before_the_last_forward_and_runs_towers_side_by_side():
    edges = ((0, 2), (1, 2))
    schedule = generate("distmm", ScheduleRequest(3, 4, edges=edges))
    validate(schedule)
    timeline = simulate(schedule, StageCosts.uniform(3, input_grad_s=1.0, weight_grad_s=1.0))
    kind = timeline.action[:, KIND]
    assert timeline.end_s[kind == Kind.F].max() <= timeline.start_s[kind == Kind.B].min()
    assert timeline.makespan_s == pytest.approx((4 + 2 - 1) * 3)
    assert timeline.bubble_over_total == pytest.approx(1 / 5)
    assert timeline.peak_memory().tolist() == [4, 4, 4]
    chain = generate("distmm", ScheduleRequest(4, 6))
    gpipe = generate("gpipe", ScheduleRequest(4, 6))
    assert all(np.array_equal(a, b) for a, b in zip(chain.orders, gpipe.orders, strict=True))


def test_graphpipe_refuses_a_cycle_and_an_unknown_stage():
    with pytest.raises(InvalidArgument, match="cycle"):
        generate("graphpipe", ScheduleRequest(2, 2, edges=((0, 1), (1, 0))))
    with pytest.raises(InvalidArgument, match=r"\(1, 7\)"):
        generate("graphpipe", ScheduleRequest(2, 2, edges=((0, 1), (1, 7))))


@settings(max_examples=30)
@given(st.data())
def test_batch_splitting_equals_every_split_of_the_sorted_samples(data):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    ranks = data.draw(st.integers(1, 4))
    cap = data.draw(st.integers(max(lengths), 120))

    def seconds(count: int, longest: int) -> float:
        return count * longest + 0.01 * count * longest**2 + 3

    def activation(count: int, longest: int) -> float:
        return count * longest

    def value(batches) -> float:
        times = [seconds(len(batch), max(lengths[i] for i in batch)) for batch in batches]
        return sum(times) + (ranks - 1) * max(times)

    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    best = np.inf
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        batches = [[order[0]]]
        for index, cut in zip(order[1:], cuts, strict=True):
            batches.append([index]) if cut else batches[-1].append(index)
        if all(activation(len(batch), max(lengths[i] for i in batch)) <= cap for batch in batches):
            best = min(best, value(batches))
    found = split_batch(lengths, ranks, seconds, activation, cap)
    assert value(found) == pytest.approx(best)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))


def test_splitting_says_when_one_sample_alone_is_too_long():
    with pytest.raises(Infeasible, match="500"):
        split_batch([3, 500], 2, lambda count, longest: longest, lambda count, longest: longest, 100)


def test_padding_is_the_share_of_tokens_added():
    assert padding_waste([2, 4], [[0, 1]]) == pytest.approx(0.25)
    assert padding_waste([2, 4], [[0], [1]]) == 0.0


def test_the_adaptive_order_stays_under_its_cap_with_unequal_microbatches():
    activation = np.array([3.0, 1.0, 2.0, 1.0, 3.0, 1.0])
    schedule = order_under_cap(ScheduleRequest(4, 6), activation, 4.0)
    validate(schedule)
    timeline = simulate(
        schedule, StageCosts.uniform(4), shares=Shares(microbatch_time=activation, microbatch_activation=activation)
    )
    assert timeline.peak_memory().max() <= 4.0


@settings(max_examples=30)
@given(st.data())
def test_pairing_operators_equals_every_pairing(data):
    forward = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    backward = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    pair = np.array([[data.draw(st.integers(max(f, b), f + b)) for b in backward] for f in forward], dtype=float)

    def best(i: int, j: int) -> float:
        options = [0.0] if i == len(forward) and j == len(backward) else []
        if i < len(forward):
            options.append(forward[i] + best(i + 1, j))
        if j < len(backward):
            options.append(backward[j] + best(i, j + 1))
        if i < len(forward) and j < len(backward):
            options.append(pair[i, j] + best(i + 1, j + 1))
        return min(options)

    assert paired_s(forward, backward, pair) == best(0, 0)


def test_dhelix_with_overlapping_pairs_is_faster_than_without():
    costs = StageCosts.uniform(8, num_chunks=2)
    schedule = generate("dhelix", ScheduleRequest(4, 16))
    apart = simulate(schedule, costs).makespan_s
    forward_backward = float(costs.forward_s[0] + costs.input_grad_s[0] + costs.weight_grad_s[0])
    overlapped = simulate(schedule, costs, shares=Shares(overlap_s=np.full((8, 8), 0.8 * forward_backward)))
    assert overlapped.makespan_s < apart


@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(2, 1), (2, 2), (4, 1), (4, 2), (8, 2), (16, 4)])
@pytest.mark.parametrize("is_uneven", [False, True])
def test_a_repetend_reaches_the_busiest_ranks_work(num_ranks, num_chunks, is_uneven):
    stages = num_ranks * num_chunks
    costs = StageCosts.uniform(stages, num_chunks=num_chunks)
    if is_uneven:
        costs = StageCosts.of(*np.random.default_rng(stages).uniform(0.5, 1.5, (3, stages)))
    schedule = generate("tessel", ScheduleRequest(num_ranks, 24, num_chunks=num_chunks, costs=costs))
    validate(schedule)
    work_s = (costs.forward_s + costs.input_grad_s + costs.weight_grad_s) @ (
        schedule.placement[0][:, None] == np.arange(num_ranks)
    )
    assert schedule.parameters["period_s"] == pytest.approx(work_s.max())
    latest_s = schedule.parameters["in_flight"] * work_s.max()
    assert simulate(schedule, costs).makespan_s <= (24 * work_s.max() + latest_s) * (1 + 1e-9)


def test_a_repetend_needs_no_more_activations_than_1f1b_and_fewer_on_a_v():
    for num_chunks, cap in ((1, 4.0), (2, 3.0)):
        costs = StageCosts.uniform(4 * num_chunks, num_chunks=num_chunks)
        schedule = generate("tessel", ScheduleRequest(4, 16, num_chunks=num_chunks, costs=costs, memory_cap=cap))
        assert schedule.parameters["period_s"] == pytest.approx(3.0)
        assert peak_activations(schedule, costs).max() <= cap


def test_a_repetend_of_one_microbatch_is_the_last_resort():
    costs = StageCosts.uniform(8, num_chunks=2)
    serial = generate("tessel", ScheduleRequest(4, 6, costs=costs, memory_cap=1.0))
    validate(serial, costs=costs, memory_cap=1.0)
    assert serial.parameters["in_flight"] == 1
    with pytest.raises(Infeasible, match=r"holds 1 activations on a rank, the cap is 0.9"):
        generate("tessel", ScheduleRequest(4, 6, costs=costs, memory_cap=0.9))


def test_filling_bubbles_lengthens_nothing_and_uses_them():
    costs = StageCosts.of([1.0] * 4, [1.0] * 4, [1.0] * 4)
    base = generate("1f1b", ScheduleRequest(4, 8))
    timeline = simulate(base, costs)
    found = filled(base, timeline, [[2.0, 1.0, 0.5, 50.0]] * 4)
    assert found.num_left_out == 4
    again = simulate(found.schedule, costs, shares=Shares(fill_s=found.fill_s))
    assert again.makespan_s == timeline.makespan_s
    assert again.busy_s().tolist() == (timeline.busy_s() + 3.5).tolist()


def test_encoder_work_in_the_bubbles_shortens_the_step():
    """Optimus: the encoder of the next batch runs in bubbles of the language model instead of in front of its first stage."""
    encoder_s = 0.5  # of a microbatch
    costs = StageCosts.uniform(4)
    schedule = generate("1f1b", ScheduleRequest(4, 8))
    in_front = StageCosts.of([1.0 + encoder_s, 1.0, 1.0, 1.0], [1.0 + encoder_s, 1, 1, 1], [1.0 + encoder_s, 1, 1, 1])
    items_s = [[encoder_s] * (3 * 8 // 4)] * 4  # forward and backward of all microbatches, dealt to the ranks
    found = filled(schedule, simulate(schedule, costs), items_s)
    assert found.num_left_out == 0
    validate(found.schedule)
    beside_s = simulate(found.schedule, costs, shares=Shares(fill_s=found.fill_s)).makespan_s
    assert beside_s == simulate(schedule, costs).makespan_s
    assert beside_s < 0.85 * simulate(schedule, in_front).makespan_s


def test_a_rank_of_1f1b_idles_nine_forwards_at_four_ranks():
    costs = StageCosts.of([1.0] * 4, [1.0] * 4, [1.0] * 4)
    timeline = simulate(generate("1f1b", ScheduleRequest(4, 8)), costs)
    assert (timeline.makespan_s - timeline.busy_s()).tolist() == [9.0] * 4


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(1, 5), st.floats(0, 2), st.floats(0.1, 3))
def test_slice_lengths_equal_every_composition(units, stages, quadratic, linear):
    def seconds(length: int, prefix: int) -> float:
        return 0.5 + linear * length + quadratic * length * (prefix + length / 2)

    def value(lengths) -> float:
        times, prefix = [], 0
        for length in lengths:
            times.append(seconds(length, prefix))
            prefix += length
        return sum(times) + (stages - 1) * max(times)

    compositions = [
        [len(list(group)) for _, group in itertools.groupby(np.cumsum([0, *cuts]).tolist())]
        for cuts in itertools.product([0, 1], repeat=units - 1)
    ]
    assert value(fastest_slices(units, stages, seconds)) == pytest.approx(min(map(value, compositions)))


def test_equal_work_lengths_decrease_with_attention_and_are_equal_without():
    lengths = equal_work_slices(4096, 4, 1.0, 0.001)
    assert list(lengths) == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    assert sum(lengths) == 4096
    prefix = np.cumsum([0, *lengths])
    work = [lengths[k] + 0.001 * (prefix[k + 1] ** 2 - prefix[k] ** 2) / 2 for k in range(4)]
    assert max(work) / min(work) < 1.01
    assert equal_work_slices(4096, 4, 1.0, 0.0) == (1024,) * 4


def test_skipping_recomputation_on_the_last_stage_shortens_1f1b():
    """Merak: the last stage's forward is directly followed by its backward, so there is nothing to recompute for."""
    ones = [1.0] * 4
    schedule = generate("1f1b", ScheduleRequest(4, 8))
    everywhere = simulate(schedule, StageCosts.of(ones, ones, ones, recompute_s=ones))
    not_last = simulate(schedule, StageCosts.of(ones, ones, ones, recompute_s=[1.0, 1.0, 1.0, 0.0]))
    assert not_last.makespan_s < everywhere.makespan_s


@settings(max_examples=40)
@given(st.integers(2, 5), st.integers(1, 8), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.5]))
def test_no_rank_of_varuna_waits_while_something_is_ready(num_ranks, num_microbatches, seed, latency_s):
    costs = StageCosts.of(*np.random.default_rng(seed).uniform(0.5, 1.5, (3, num_ranks)))
    schedule = generate("varuna", ScheduleRequest(num_ranks, num_microbatches, costs=costs, latency_s=latency_s))
    validate(schedule)
    timeline = simulate(schedule, costs, links=Links(latency_s=latency_s))
    end = {
        (int(row[KIND]), int(row[STAGE]), int(row[MICROBATCH])): float(time)
        for row, time in zip(timeline.action, timeline.end_s, strict=True)
    }

    def ready_s(kind: int, stage: int, microbatch: int) -> float:
        if kind == Kind.F:
            return end[kind, stage - 1, microbatch] + latency_s if stage else 0.0
        own = end[int(Kind.F), stage, microbatch]
        return own if stage == num_ranks - 1 else max(own, end[kind, stage + 1, microbatch] + latency_s)

    for rank in range(num_ranks):
        mine = (timeline.rank == rank) & (timeline.lane == COMPUTE_LANE)
        spans = sorted(zip(timeline.start_s[mine], timeline.end_s[mine], timeline.action[mine].tolist(), strict=True))
        free_s = 0.0
        for index, (start_s, end_s, _) in enumerate(spans):
            if start_s > free_s + 1e-9:  # nothing that runs later was ready in this gap
                later = [ready_s(row[KIND], row[STAGE], row[MICROBATCH]) for _, _, row in spans[index:]]
                assert min(later) >= start_s - 1e-9
            free_s = end_s


def test_varuna_hides_latency_that_1f1b_waits_for_and_keeps_its_cap():
    costs = StageCosts.uniform(3)
    request = ScheduleRequest(3, 12, latency_s=1.0)
    links = Links(latency_s=1.0)
    plain = simulate(generate("1f1b", request), costs, links=links)
    free = generate("varuna", request)
    assert simulate(free, costs, links=links).makespan_s < 0.8 * plain.makespan_s
    capped = generate("varuna", ScheduleRequest(3, 12, latency_s=1.0, memory_cap=4.0))
    assert peak_activations(capped, costs).max() == 4
    with pytest.raises(InvalidArgument, match=r"holds 1 on one rank, the cap is 0\.5"):
        generate("varuna", ScheduleRequest(3, 12, memory_cap=0.5))
