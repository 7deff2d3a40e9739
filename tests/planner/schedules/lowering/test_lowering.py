"""Lowering keeps what a schedule means and when it runs, and what it adds is what a runtime needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.lowering import lower, merge_backwards
from stagewright.planner.schedules.lowering.messages import joint_edges, shares_rows, stages_without_instant
from stagewright.planner.schedules.registry import families
from stagewright.planner.schedules.registry import family as family_of
from stagewright.planner.schedules.schedule import KIND, STAGE, Schedule, WeightPolicy, encode
from stagewright.planner.simulation.nccl import check_nccl
from stagewright.planner.simulation.network import Collectives, Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate
from tests.planner.simulation.random_schedules import gpipe, one_f_one_b, schedules

SIZES = ((2, 4), (4, 8), (4, 12), (6, 12), (8, 16))


def registry_cases():
    """Every family at every size."""
    return [(family.name, ranks, microbatches) for family in families() for ranks, microbatches in SIZES]


@pytest.mark.parametrize(("name", "ranks", "microbatches"), registry_cases())
def test_every_lowered_named_schedule_passes_the_nccl_checker(name, ranks, microbatches):
    family = next(row for row in families() if row.name == name)
    try:
        schedule = family.generate(ScheduleRequest(ranks, microbatches, num_slices=2))
    except InvalidArgument:
        try:
            schedule = family.generate(ScheduleRequest(ranks, microbatches))
        except InvalidArgument as refusal:
            pytest.skip(f"{name} does not admit these sizes: {refusal}")
    costs = StageCosts.uniform(schedule.num_stages)
    lowered = lower(schedule, costs, data_parallel=True, zero=3, links=Links(latency_s=0.1), merge="none")
    check_nccl(lowered, per_direction=True)
    check_nccl(lowered, per_direction=False)
    validate(lowered)


@given(schedules(dag=False))
@settings(max_examples=60)
def test_sends_at_the_end_of_their_producers_change_no_time(case):
    schedule, costs, rng = case
    links = Links(latency_s=0.25, bytes_per_s=rng.choice([1.0, float("inf")]), boundary_bytes=0.5)
    before = simulate(schedule, costs, links=links)
    after = simulate(lower(schedule, costs, merge="none", links=links), costs, links=links)
    assert after.makespan_s == pytest.approx(before.makespan_s, rel=1e-12)
    assert after.peak_memory() == pytest.approx(before.peak_memory())
    assert after.link_bytes == pytest.approx(before.link_bytes)


def test_a_send_follows_its_action_and_a_receive_precedes_its_use():
    lowered = lower(one_f_one_b(2, 2), StageCosts.uniform(2))
    assert lowered.text(0) == ["0F0", "0SEND_F0", "0F1", "0SEND_F1", "0RECV_B0", "0B0", "0RECV_B1", "0B1", "0OPT"]
    assert lowered.text(1) == ["1RECV_F0", "1F0", "1RECV_F1", "1B0", "1SEND_B0", "1F1", "1B1", "1SEND_B1", "1OPT"]


def test_two_stages_on_one_rank_need_no_message():
    placement = np.array([[0, 1, 1, 0]], dtype=np.int32)
    orders = (
        encode([Action(kind, stage, 0) for kind, stage in ((Kind.F, 0), (Kind.F, 3), (Kind.B, 3), (Kind.B, 0))]),
        encode([Action(kind, stage, 0) for kind, stage in ((Kind.F, 1), (Kind.F, 2), (Kind.B, 2), (Kind.B, 1))]),
    )
    lowered = lower(Schedule("custom", 1, placement, orders), StageCosts.uniform(4))
    sends = [step for rank in (0, 1) for step in lowered.text(rank) if "SEND" in step]
    assert sends == ["0SEND_F0", "3SEND_B0", "2SEND_F0", "1SEND_B0"]


def test_one_row_sends_to_both_branches_and_one_receives_from_both():
    edges = ((0, 1), (0, 2), (1, 3), (2, 3))
    orders = tuple(encode([Action(kind, stage, m) for kind in (Kind.F, Kind.B) for m in (0, 1)]) for stage in range(4))
    schedule = Schedule("custom", 2, np.arange(4, dtype=np.int32)[None, :], orders, edges=edges)
    lowered = lower(schedule, StageCosts.uniform(4), links=Links(latency_s=0.25))
    check_nccl(lowered)
    assert [step for step in lowered.text(0) if "SEND" in step or "RECV" in step] == [
        "0SEND_F0",
        "0SEND_F1",
        "0RECV_B0",
        "0RECV_B1",
    ]
    assert [step for step in lowered.text(3) if "RECV" in step] == ["3RECV_F0", "3RECV_F1"]
    assert simulate(lowered, StageCosts.uniform(4)).makespan_s == simulate(schedule, StageCosts.uniform(4)).makespan_s


@pytest.mark.parametrize("latency_s", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "parameters"), [("1f1b-vocab", {"algorithm": 1}), ("1f1b-vocab", {"algorithm": 2}), ("pipefb", {})]
)
def test_stages_that_join_and_fork_send_in_one_order_without_losing_time(name, parameters, latency_s):
    rng = np.random.default_rng(5)
    links = Links(latency_s=latency_s)
    for ranks, microbatches in ((2, 3), (3, 5), (4, 8), (5, 12)):
        stages = len(family_of(name).generate(ScheduleRequest(ranks, microbatches)).placement[0])
        costs = StageCosts.of(*rng.uniform(0.5, 1.5, (3, stages)))
        request = ScheduleRequest(ranks, microbatches, costs=costs, latency_s=latency_s, parameters=parameters)
        schedule = family_of(name).generate(request)
        lowered = lower(schedule, costs, data_parallel=True, links=links, merge="none")
        check_nccl(lowered, per_direction=True)
        check_nccl(lowered, per_direction=False)
        validate(lowered)
        before_s, after_s = (simulate(each, costs, links=links).makespan_s for each in (schedule, lowered))
        if name == "1f1b-vocab":
            assert after_s == pytest.approx(before_s, rel=1e-12)
        else:  # the activation of a stage waits for the one that the stage before has passed on
            assert before_s <= after_s * (1 + 1e-12) <= 1.1 * before_s


def test_receivers_wait_for_all_senders_of_their_group():
    """Of PipeFB on four ranks stage 1 sends to 2 and 5, and stage 4 to 5: so 2 waits for 4 too."""
    schedule = family_of("pipefb").generate(ScheduleRequest(4, 4))
    assert joint_edges(schedule) == (*schedule.edges, (4, 2), (5, 3))
    for chain in (one_f_one_b(4, 4), family_of("1f1b-vocab").generate(ScheduleRequest(4, 4))):
        assert joint_edges(chain) == chain.edges


@given(schedules(fused=False, slices=1))
@settings(max_examples=60)
def test_any_stage_graph_is_lowered_to_one_order_of_messages_or_refused(case):
    schedule, costs, _ = case
    try:
        lowered = lower(schedule, costs, merge="none", links=Links(latency_s=0.25))
    except InvalidSchedule as error:
        assert shares_rows(schedule), error
        return
    validate(lowered)
    if not stages_without_instant(schedule):
        check_nccl(lowered, per_direction=True)
        check_nccl(lowered, per_direction=False)


def test_a_skip_connection_over_a_stage_sends_when_each_producer_ends():
    """Stage 1 receives from 0, and stage 2 from both: no instant holds what 0 and 1 send."""
    schedule = replace(one_f_one_b(3, 5), edges=((0, 1), (1, 2), (0, 2)))
    assert stages_without_instant(schedule) == {0, 1, 2}
    assert joint_edges(schedule) == schedule.edges
    costs = StageCosts.uniform(3)
    lowered = lower(schedule, costs)
    validate(lowered)
    before_s, after_s = (simulate(each, costs).makespan_s for each in (schedule, lowered))
    assert after_s == pytest.approx(before_s, rel=1e-12)


def test_merging_everything_turns_a_split_1f1b_back_and_free_merging_never_costs_time():
    plain = one_f_one_b(4, 8)
    split_orders = []
    for order in plain.orders:
        rows = np.repeat(order, np.where(order[:, KIND] == Kind.B, 2, 1), axis=0)
        backward = np.flatnonzero(rows[:, KIND] == Kind.B)
        rows[backward[::2], KIND], rows[backward[1::2], KIND] = Kind.I, Kind.W
        split_orders.append(rows)
    split = replace(plain, orders=tuple(split_orders))
    costs = StageCosts.uniform(4)
    merged = merge_backwards(split, costs, which="all")
    assert all((a == b).all() for a, b in zip(merged.orders, plain.orders, strict=True))
    free = merge_backwards(split, costs)
    assert simulate(free, costs).makespan_s == simulate(split, costs).makespan_s < simulate(plain, costs).makespan_s
    assert sum(len(order) for order in free.orders) < sum(len(order) for order in split.orders)
    assert merge_backwards(split, costs, which="none") is split


@given(schedules())
@settings(max_examples=80)
def test_free_merges_never_lengthen_the_step_and_stay_valid(case):
    schedule, costs, rng = case
    links = Links(latency_s=rng.choice([0.0, 0.5]), bytes_per_s=rng.choice([2.0, float("inf")]), boundary_bytes=1.0)
    merged = merge_backwards(schedule, costs, links=links)
    validate(merged)
    assert simulate(merged, costs, links=links).makespan_s <= simulate(schedule, costs, links=links).makespan_s * (
        1 + 1e-12
    )


def test_a_reduction_follows_the_last_backward_of_its_stage_and_precedes_its_step():
    lowered = lower(one_f_one_b(4, 8), StageCosts.uniform(4), data_parallel=True)
    for rank in range(4):
        steps = lowered.text(rank)
        reduction, last = steps.index(f"{rank}REDUCE_GRAD"), steps.index(f"{rank}B7")
        assert last < reduction < steps.index(f"{rank}OPT")
        assert [step for step in steps[last:reduction] if "SEND" not in step] == [f"{rank}B7"]
    assert not any("REDUCE" in step for step in lower(one_f_one_b(4, 8), StageCosts.uniform(4)).text(0))


def test_replicas_of_a_stage_always_reduce_in_one_order_on_all_ranks():
    dualpipe = next(row for row in families() if row.name == "dualpipe").generate(ScheduleRequest(4, 12))
    lowered = lower(dualpipe, StageCosts.uniform(4))
    reductions = [[int(row[STAGE]) for row in order if row[KIND] == Kind.REDUCE_GRAD] for order in lowered.orders]
    assert [sorted(stages) for stages in reductions] == [[0, 3], [1, 2], [1, 2], [0, 3]]
    assert reductions[0] == reductions[3]
    assert reductions[1] == reductions[2]
    simulate(lowered, StageCosts.uniform(4), collectives=Collectives(reduce_grad_s=3.0))


def test_breadth_first_gathers_twice_a_chunk_and_depth_first_twice_a_microbatch():
    costs = StageCosts.uniform(8)
    breadth = next(row for row in families() if row.name == "breadth-first").generate(
        ScheduleRequest(4, 8, num_chunks=2)
    )
    lowered = lower(breadth, costs, data_parallel=True, zero=3)
    for stage, rank in enumerate(lowered.placement[0].tolist()):
        assert lowered.text(rank).count(f"{stage}UNSHARD") == 2
        assert lowered.text(rank).count(f"{stage}RESHARD") == 2
    literal = lower(one_f_one_b(4, 8), StageCosts.uniform(4), data_parallel=True, zero=3, gather="microbatch")
    assert [literal.text(rank).count(f"{rank}UNSHARD") for rank in range(4)] == [16] * 4
    by_run = lower(gpipe(4, 8), StageCosts.uniform(4), data_parallel=True, zero=3)
    assert by_run.text(1).count("1UNSHARD") == 2


def test_no_weight_gradient_needs_gathered_parameters():
    steps = [
        Action(Kind.F, 0, 0),
        Action(Kind.I, 0, 0),
        Action(Kind.F, 0, 1),
        Action(Kind.W, 0, 0),
        Action(Kind.I, 0, 1),
        Action(Kind.W, 0, 1),
    ]
    schedule = Schedule("custom", 2, np.array([[0]], dtype=np.int32), (encode(steps),))
    lowered = lower(schedule, StageCosts.uniform(1), zero=3, merge="none", optimizer=False)
    assert lowered.text(0) == (
        [
            "0UNSHARD",
            "0F0",
            "0RESHARD",
            "0UNSHARD",
            "0I0",
            "0RESHARD",
            "0UNSHARD",
            "0F1",
            "0RESHARD",
            "0W0",
            "0UNSHARD",
            "0I1",
            "0RESHARD",
            "0W1",
        ]
    )


def test_weights_that_change_under_way_are_stepped_after_each_microbatch():
    stash = replace(one_f_one_b(2, 2), weight_policy=WeightPolicy.STASH)
    steps = [step for step in lower(stash, StageCosts.uniform(2)).text(1) if "RECV" not in step and "SEND" not in step]
    assert steps == ["1F0", "1B0", "1OPT0", "1F1", "1B1", "1OPT1"]
    double = replace(one_f_one_b(2, 2), weight_policy=WeightPolicy.DOUBLE_BUFFER)
    assert lower(double, StageCosts.uniform(2)).text(1)[-1] == "1OPT"


def test_lowering_twice_or_an_unknown_zero_stage_is_refused():
    lowered = lower(one_f_one_b(2, 2), StageCosts.uniform(2))
    with pytest.raises(InvalidArgument, match="lowered already: rank 0 holds SEND_F"):
        lower(lowered, StageCosts.uniform(2))
    with pytest.raises(InvalidArgument, match="ZeRO stage 4"):
        lower(one_f_one_b(2, 2), StageCosts.uniform(2), zero=4)
