"""The rich simulator against hand-made cases and against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy, decode, encode
from stagewright.planner.simulation.network import Collectives, Links, Memory, Shares
from stagewright.planner.simulation.simulate import action_times, simulate
from stagewright.planner.simulation.timeline import COLLECTIVE_LANE, COMPUTE_LANE, HOST_LANE, SEND_LANE
from tests.planner.simulation.random_schedules import gpipe, one_f_one_b, reference, schedules

UNIT4 = StageCosts.uniform(4)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "bubble"), [(4, 4, 3 / 7), (4, 8, 3 / 11), (8, 8, 7 / 15), (8, 32, 7 / 39)]
)
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_gpipe_and_1f1b_idle_as_their_papers_say_for_any_backward(make, ranks, microbatches, bubble, backward):
    costs = StageCosts.uniform(ranks, input_grad_s=backward / 2, weight_grad_s=backward / 2)
    assert simulate(make(ranks, microbatches), costs).bubble_over_total == pytest.approx(bubble, rel=1e-12)


def test_1f1b_holds_min_t_d_minus_rank_activations():
    assert simulate(one_f_one_b(4, 8), UNIT4).peak_memory().tolist() == [4, 3, 2, 1]
    assert simulate(one_f_one_b(4, 2), UNIT4).peak_memory().tolist() == [2, 2, 2, 1]
    assert simulate(gpipe(4, 8), UNIT4).peak_memory().tolist() == [8, 8, 8, 8]


def test_a_latency_stands_on_the_critical_path_twice_a_round_trip():
    timeline = simulate(one_f_one_b(2, 1), StageCosts.uniform(2), links=Links(latency_s=0.25))
    assert timeline.makespan_s == 6.5
    kinds = [decode(row).kind for row in timeline.action[timeline.critical_path].tolist()]
    assert kinds == [Kind.F, Kind.SEND_F, Kind.F, Kind.B, Kind.SEND_B, Kind.B]


def test_a_busy_link_delays_the_second_message():
    # 1 s a forward, 4 s a message: the messages leave at 1, 5, 9 and arrive at 5, 9, 13.
    orders = (
        encode([Action(Kind.F, 0, m) for m in range(3)]),
        encode([Action(Kind.F, 1, m) for m in range(3)]),
    )
    schedule = Schedule("custom", 3, np.array([[0, 1]], dtype=np.int32), orders)
    timeline = simulate(schedule, StageCosts.uniform(2), links=Links(bytes_per_s=1.0, boundary_bytes=4.0))
    sends = timeline.lane == SEND_LANE
    assert timeline.start_s[sends].tolist() == [1, 5, 9]
    assert timeline.end_s[sends].tolist() == [5, 9, 13]
    assert timeline.makespan_s == 14
    assert timeline.link_bytes == {"p2p": 12.0}


def test_an_asymmetric_latency_counts_by_direction():
    latency = np.array([[0.0, 2.0], [5.0, 0.0]])
    assert simulate(one_f_one_b(2, 1), StageCosts.uniform(2), links=Links(latency_s=latency)).makespan_s == 6 + 7


def test_a_blocking_send_keeps_its_sender_idle():
    free = simulate(gpipe(2, 4), StageCosts.uniform(2), links=Links(latency_s=0.5))
    blocked = simulate(gpipe(2, 4), StageCosts.uniform(2), links=Links(latency_s=0.5, overlap=False))
    # 4 forwards, each with its message, then rank 1's forward; 4 backwards with theirs, then rank 0's backward
    assert (free.makespan_s, blocked.makespan_s) == (1 + 0.5 + 4 + 8 + 0.5 + 2, 4 * 1.5 + 1 + 4 * 2.5 + 2)


def test_every_span_names_its_lane_and_spans_are_sorted():
    timeline = simulate(one_f_one_b(4, 8), UNIT4, links=Links(latency_s=0.1), tail_s=1.0)
    keys = list(zip(timeline.rank.tolist(), timeline.lane.tolist(), timeline.start_s.tolist(), strict=True))
    assert keys == sorted(keys)
    assert set(timeline.lane.tolist()) == {COMPUTE_LANE, SEND_LANE}
    assert np.count_nonzero(timeline.action[:, 0] == Kind.OPT) == 4


def test_a_tail_ends_each_rank_and_is_traced():
    timeline = simulate(one_f_one_b(4, 8), UNIT4, tail_s=np.array([0.0, 0.0, 0.0, 9.0]))
    assert timeline.makespan_s == 33 - 6 + 9
    assert decode(timeline.action[timeline.critical_path[-1]].tolist()).kind is Kind.OPT


@given(schedules(), st.booleans(), st.booleans())
@settings(max_examples=150)
def test_times_equal_the_references(case, overlap, finite):
    schedule, costs, rng = case
    latency = np.array(
        [[rng.choice([0.0, 0.25, 0.5]) for _ in range(schedule.num_ranks)] for _ in range(schedule.num_ranks)]
    )
    edge_bytes = np.array([rng.choice([0.0, 1.0, 3.0]) for _ in schedule.edges])
    bandwidth = 4.0 if finite else math.inf
    expected = reference(
        schedule, costs, latency=latency, bytes_per_s=bandwidth, edge_bytes=edge_bytes, overlap=overlap
    )
    links = Links(latency_s=latency, bytes_per_s=bandwidth, boundary_bytes=edge_bytes, overlap=overlap)
    start_s, end_s = action_times(schedule, costs, links=links)
    place = 0
    for rank in range(schedule.num_ranks):
        for row in schedule.orders[rank].tolist():
            assert start_s[place] == pytest.approx(expected.start[decode(row)], abs=1e-9)
            assert end_s[place] == pytest.approx(expected.end[decode(row)], abs=1e-9)
            place += 1
    timeline = simulate(schedule, costs, links=links)
    sent = sorted(time for pair in expected.messages.values() if pair[0] < pair[1] for time in pair)
    lanes = timeline.lane == SEND_LANE
    assert sorted([*timeline.start_s[lanes], *timeline.end_s[lanes]]) == pytest.approx(sent, abs=1e-9)


@given(schedules())
@settings(max_examples=60)
def test_memory_is_the_sum_of_what_is_live(case):
    check_memory_is_the_sum_of_what_is_live(case)


@pytest.mark.soak
@given(schedules())
@settings(max_examples=500)
def test_memory_is_the_sum_of_what_is_live_at_the_full_count(case):
    check_memory_is_the_sum_of_what_is_live(case)


def check_memory_is_the_sum_of_what_is_live(case) -> None:
    schedule, costs, _ = case
    timeline = simulate(schedule, costs, links=Links(latency_s=0.25), memory=Memory(static_bytes=2.0))
    expected = reference(schedule, costs, latency=0.25)
    for rank in range(schedule.num_ranks):
        times, values = timeline.memory_time_s[rank], timeline.memory_bytes[rank]
        assert (np.diff(times) > 0).all()
        for probe in {*times.tolist(), *(times + 1e-3).tolist()}:
            live = 2.0
            for action in {decode(row) for row in schedule.orders[rank].tolist()}:
                share = 1 / schedule.num_slices if action.slice >= 0 else 1.0
                size, early = costs.activation[action.stage] * share, costs.freed_at_input_grad[action.stage]
                if action.kind is Kind.F:
                    live += size * (expected.start[action] <= probe)
                elif action.kind is Kind.B:
                    live -= size * (expected.end[action] <= probe)
                elif action.kind is Kind.I:
                    live -= size * early * ((expected.start if early < 0 else expected.end)[action] <= probe)
                else:
                    live -= size * (1 - early) * (expected.end[action] <= probe)
            at = values[np.searchsorted(times, probe, side="right") - 1]
            assert at == pytest.approx(live, abs=1e-9)
        assert values[-1] == pytest.approx(2.0, abs=1e-9)


@given(schedules())
@settings(max_examples=100)
def test_the_critical_path_has_no_gap_and_spans_the_makespan(case):
    schedule, costs, _ = case
    timeline = simulate(schedule, costs, links=Links(latency_s=0.25, bytes_per_s=2.0, boundary_bytes=0.5))
    path = timeline.critical_path
    assert timeline.start_s[path[0]] == 0.0
    assert timeline.end_s[path[-1]] == timeline.makespan_s
    if not timeline.action[:, 5].any():  # the parts of a fused pair share one span, a path may enter in its middle
        sends = timeline.lane[path] == SEND_LANE
        overlap = np.where(sends[:-1] & sends[1:], 0.25, 0.0)  # a link is free again one latency before the arrival
        assert timeline.end_s[path[:-1]] - overlap == pytest.approx(timeline.start_s[path[1:]], abs=1e-9)


def test_a_fused_pair_takes_the_overlap_tables_seconds_and_counts_once():
    orders = (encode([Action(Kind.F, 0, 0), (Action(Kind.F, 0, 1), Action(Kind.B, 0, 0)), Action(Kind.B, 0, 1)]),)
    schedule = Schedule("custom", 2, np.array([[0]], dtype=np.int32), orders)
    plain = simulate(schedule, StageCosts.uniform(1))
    overlapped = simulate(schedule, StageCosts.uniform(1), shares=Shares(overlap_s=np.array([[2.25]])))
    assert plain.makespan_s == 6.0
    assert overlapped.makespan_s == 5.25
    assert overlapped.busy_s().tolist() == [5.25]
    assert overlapped.peak_memory().tolist() == [2.0]


def test_uneven_slices_divide_time_and_activation():
    orders = (
        encode([Action(kind, 0, 0, part) for kind, parts in ((Kind.F, (0, 1)), (Kind.B, (1, 0))) for part in parts]),
    )
    schedule = Schedule("custom", 1, np.array([[0]], dtype=np.int32), orders, num_slices=2)
    shares = Shares(slice_time=np.array([0.25, 0.75]), slice_activation=np.array([0.5, 0.5]))
    timeline = simulate(schedule, StageCosts.uniform(1), shares=shares)
    assert timeline.end_s.tolist() == [0.25, 1.0, 2.5, 3.0]
    assert timeline.memory_bytes[0].tolist() == [0.5, 1.0, 0.5, 0.0]


def test_whole_backwards_wait_for_all_slices_of_a_sliced_forward():
    orders = (
        encode([Action(Kind.F, 0, 0, 0), Action(Kind.F, 0, 0, 1), Action(Kind.B, 0, 0)]),
        encode([Action(Kind.F, 1, 0, 0), Action(Kind.F, 1, 0, 1), Action(Kind.B, 1, 0)]),
    )
    schedule = Schedule("custom", 1, np.array([[0, 1]], dtype=np.int32), orders, num_slices=2)
    assert simulate(schedule, StageCosts.uniform(2)).makespan_s == 1.5 + 2 + 2


def test_microbatches_of_different_size_scale_time_and_activation():
    shares = Shares(microbatch_time=np.array([1.0, 3.0]), microbatch_activation=np.array([1.0, 2.0]))
    timeline = simulate(gpipe(1, 2), StageCosts.uniform(1), shares=shares)
    assert timeline.makespan_s == 3 * (1 + 3)
    assert timeline.peak_memory().tolist() == [3.0]


def test_a_stage_graph_with_a_join_waits_for_both_branches():
    # two branches of 2 stages and a join: depth 3, so (3 - 1) / (4 + 2) idle with 4 microbatches (GraphPipe's case)
    edges = ((0, 1), (1, 4), (2, 3), (3, 4))
    depth = [3, 2, 3, 2, 1]
    orders = []
    for stage in range(5):
        steps, warmup = [Action(Kind.F, stage, m) for m in range(min(depth[stage], 4))], min(depth[stage], 4)
        for m in range(4):
            steps.append(Action(Kind.B, stage, m))
            if m + warmup < 4:
                steps.append(Action(Kind.F, stage, m + warmup))
        orders.append(encode(steps))
    schedule = Schedule("custom", 4, np.arange(5, dtype=np.int32)[None, :], tuple(orders), edges=edges)
    assert simulate(schedule, StageCosts.uniform(5)).bubble_over_total == pytest.approx(1 / 3)


def test_recomputation_runs_inside_the_backward_or_as_its_own_action():
    costs = StageCosts.of([1.0], [1.0], [1.0], recompute_s=[1.0])
    inside = simulate(gpipe(1, 1), costs, memory=Memory(recomputed_bytes=10.0))
    apart = Schedule(
        "custom",
        1,
        np.array([[0]], dtype=np.int32),
        (encode([Action(kind, 0, 0) for kind in (Kind.F, Kind.R, Kind.I, Kind.W)]),),
    )
    beside = simulate(apart, costs, memory=Memory(recomputed_bytes=10.0))
    assert inside.makespan_s == beside.makespan_s == 4.0
    assert inside.memory_bytes[0].tolist() == beside.memory_bytes[0].tolist() == [1.0, 11.0, 0.0]


def test_recomputation_keeps_t_boundaries_and_one_activation():
    """GPipe's rematerialisation: T x boundary + 1 x M_a, and compute grows by a third at tB = 2 tF."""
    costs = StageCosts.of(np.ones(4), np.ones(4), np.ones(4), activation=np.full(4, 0.125), recompute_s=np.ones(4))
    timeline = simulate(gpipe(4, 8), costs, memory=Memory(recomputed_bytes=1.0))
    assert timeline.peak_memory().tolist() == [8 * 0.125 + 1] * 4
    assert timeline.busy_s().tolist() == [8 * 4] * 4


def test_an_evicted_activation_lives_on_the_peer_until_it_is_loaded():
    orders = (
        encode(
            [Action(kind, 0, 0) for kind in (Kind.F, Kind.EVICT)]
            + [Action(Kind.F, 0, 1), Action(Kind.B, 0, 1), Action(Kind.LOAD, 0, 0), Action(Kind.B, 0, 0)]
        ),
        encode([]),
    )
    schedule = Schedule("custom", 2, np.array([[0]], dtype=np.int32), orders)
    timeline = simulate(schedule, StageCosts.uniform(1), links=Links(peer_bytes_per_s=2.0))
    assert timeline.makespan_s == 6.0  # both transfers run under compute: evict 1 to 1.5, load 2 to 2.5
    assert timeline.memory_time_s[1].tolist() == [0.0, 1.0, 2.5]
    assert timeline.memory_bytes[1].tolist() == [0.0, 1.0, 0.0]
    assert timeline.peak_memory().tolist() == [2.0, 1.0]
    assert np.count_nonzero(timeline.lane == SEND_LANE) == 2


def test_a_slow_host_link_stalls_the_backward_that_needs_the_activation():
    steps = [
        Action(Kind.F, 0, 0),
        Action(Kind.OFFLOAD, 0, 0),
        Action(Kind.F, 0, 1),
        Action(Kind.B, 0, 1),
        Action(Kind.RELOAD, 0, 0),
        Action(Kind.B, 0, 0),
    ]
    schedule = Schedule("custom", 2, np.array([[0]], dtype=np.int32), (encode(steps),))
    timeline = simulate(schedule, StageCosts.uniform(1), links=Links(host_bytes_per_s=0.25))
    # away 1 to 5, back 5 to 9 (not before it is away), backward 9 to 11
    assert timeline.makespan_s == 11.0
    assert np.count_nonzero(timeline.lane == HOST_LANE) == 2


def test_reductions_run_beside_compute_or_stop_it():
    steps = [
        Action(Kind.F, 0, 0),
        Action(Kind.F, 1, 0),
        Action(Kind.B, 1, 0),
        Action(Kind.REDUCE_GRAD, 1),
        Action(Kind.B, 0, 0),
    ]
    steps += [Action(Kind.REDUCE_GRAD, 0), Action(Kind.OPT, 1), Action(Kind.OPT, 0)]
    schedule = Schedule("custom", 1, np.array([[0, 0]], dtype=np.int32), (encode(steps),))
    times = {"reduce_grad_s": 2.0, "optimizer_s": 0.5}
    overlapped = simulate(schedule, StageCosts.uniform(2), collectives=Collectives(**times))
    stopped = simulate(schedule, StageCosts.uniform(2), collectives=Collectives(**times, overlap=False))
    # beside: 4 to 6 under 0B0, then 6 to 8; stopping: 4 to 6, 0B0 until 8, 8 to 10
    lane = overlapped.lane == COLLECTIVE_LANE
    assert overlapped.start_s[lane].tolist() == [4.0, 6.0]
    assert overlapped.makespan_s == 8.5
    assert stopped.start_s[stopped.lane == COLLECTIVE_LANE].tolist() == [4.0, 8.0]
    assert stopped.makespan_s == 11.0


def test_replicas_reduce_together_when_the_last_of_them_is_ready():
    placement = np.array([[0], [1]], dtype=np.int32)
    orders = (
        encode([Action(Kind.F, 0, 0), Action(Kind.B, 0, 0), Action(Kind.REDUCE_GRAD, 0), Action(Kind.OPT, 0)]),
        encode(
            [Action(kind, 0, m, replica=1) for m in (1, 2) for kind in (Kind.F, Kind.B)]
            + [Action(Kind.REDUCE_GRAD, 0, replica=1), Action(Kind.OPT, 0, replica=1)]
        ),
    )
    schedule = Schedule("custom", 3, placement, orders)
    timeline = simulate(schedule, StageCosts.uniform(1), collectives=Collectives(reduce_grad_s=1.0, optimizer_s=0.5))
    reductions = timeline.lane == COLLECTIVE_LANE
    assert timeline.start_s[reductions].tolist() == [6.0, 6.0]
    assert timeline.makespan_s == 7.5


def test_gathered_parameters_are_waited_for_and_counted():
    steps = [
        Action(Kind.UNSHARD, 0),
        Action(Kind.F, 0, 0),
        Action(Kind.RESHARD, 0),
        Action(Kind.UNSHARD, 0),
        Action(Kind.B, 0, 0),
        Action(Kind.RESHARD, 0),
    ]
    schedule = Schedule("custom", 1, np.array([[0]], dtype=np.int32), (encode(steps),))
    timeline = simulate(
        schedule, StageCosts.uniform(1), collectives=Collectives(unshard_s=0.5), memory=Memory(gathered_bytes=4.0)
    )
    # the second gather runs under the forward: 0.5 + 1 + 2
    assert timeline.makespan_s == 3.5
    assert timeline.peak_memory().tolist() == [5.0 + 4.0]


def test_weight_versions_multiply_weights_only():
    memory = Memory(weight_bytes=10.0, optimizer_bytes=3.0)
    schedule = one_f_one_b(4, 8)
    stash = Schedule("pipedream", 8, schedule.placement, schedule.orders, weight_policy=WeightPolicy.STASH)
    assert simulate(stash, UNIT4, memory=memory).peak_memory().tolist() == [
        40 + 3 + 4,
        30 + 3 + 3,
        20 + 3 + 2,
        10 + 3 + 1,
    ]
    assert simulate(schedule, UNIT4, memory=memory).peak_memory().tolist() == [17, 16, 15, 14]


def test_receive_buffers_count_from_arrival_to_use():
    timeline = simulate(
        gpipe(2, 2), StageCosts.uniform(2), links=Links(boundary_bytes=8.0), memory=Memory(receive_buffers=True)
    )
    # rank 1 holds the input of the microbatch it forwards and of none waiting; its two activations afterwards
    assert timeline.memory_bytes[1].max() == 2 + 8


def test_filler_actions_take_their_own_seconds():
    steps = [Action(Kind.F, 0, 0), Action(Kind.FILL, 0, 0), Action(Kind.B, 0, 0)]
    schedule = Schedule("custom", 1, np.array([[0]], dtype=np.int32), (encode(steps),))
    assert simulate(schedule, StageCosts.uniform(1), shares=Shares(fill_s=np.array([0.5]))).makespan_s == 3.5
    with pytest.raises(InvalidArgument, match="1 work items"):
        simulate(schedule, StageCosts.uniform(1))


def test_the_same_input_gives_the_same_bytes():
    runs = [simulate(one_f_one_b(4, 8), UNIT4, links=Links(latency_s=0.1)) for _ in range(2)]
    for name in ("rank", "lane", "action", "start_s", "end_s", "critical_path"):
        assert getattr(runs[0], name).tobytes() == getattr(runs[1], name).tobytes()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: simulate(one_f_one_b(4, 8), StageCosts.uniform(3)), "3 stage costs were given"),
        (lambda: Links(latency_s=-1.0), "latency_s is -1"),
        (lambda: Links(bytes_per_s=0.0), "bytes_per_s is 0"),
        (lambda: Links(latency_s=math.nan), "latency_s is nan"),
        (lambda: Collectives(reduce_grad_s=math.inf), "reduce_grad_s is inf"),
        (lambda: simulate(one_f_one_b(2, 2), StageCosts.uniform(2), tail_s=np.zeros(3)), r"tail_s has shape \(3,\)"),
    ],
)
def test_wrong_numbers_are_refused_with_the_number(make, words):
    with pytest.raises(InvalidArgument, match=words):
        make()


def test_single_actions_take_seconds_of_their_own():
    """One microbatch down and up two ranks, F 1 and B 2: rank 1's F three times as long, half a second more on rank 0's B."""
    schedule = one_f_one_b(2, 1)
    rows = [(rank, row.kind) for rank in range(2) for step in schedule.actions(rank) for row in step]
    factor = np.array([3.0 if row == (1, Kind.F) else 1.0 for row in rows])
    extra_s = np.array([0.5 if row == (0, Kind.B) else 0.0 for row in rows])
    plain = simulate(schedule, StageCosts.uniform(2))
    changed = simulate(schedule, StageCosts.uniform(2), shares=Shares(row_factor=factor, row_extra_s=extra_s))
    assert (plain.makespan_s, changed.makespan_s) == (6.0, 6.0 + 2.0 + 0.5)
    with pytest.raises(InvalidArgument, match="row_factor has shape"):
        simulate(schedule, StageCosts.uniform(2), shares=Shares(row_factor=np.ones(3)))


@given(schedules())
@settings(max_examples=20)
def test_rows_of_their_own_that_change_nothing_change_nothing(case):
    schedule, costs, _ = case
    same = Shares(row_factor=np.ones(sum(len(order) for order in schedule.orders)))
    links = Links(latency_s=0.25)
    plain = simulate(schedule, costs, links=links)
    assert simulate(schedule, costs, links=links, shares=same).makespan_s == pytest.approx(plain.makespan_s, rel=1e-12)
