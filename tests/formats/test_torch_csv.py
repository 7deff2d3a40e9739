"""Schedules as torch's pipelining CSV, checked by torch's own validator and read back."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from stagewright.formats.torch_csv import parse_torch_csv, torch_csv
from stagewright.planner.errors import InvalidArgument, InvalidSchedule, NotExpressible
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.lowering import lower
from stagewright.planner.schedules.registry import families
from stagewright.planner.schedules.schedule import FUSED, Schedule, WeightPolicy, encode
from stagewright.planner.simulation.nccl import check_nccl
from tests.planner.simulation.random_schedules import one_f_one_b, schedules


def named(name, ranks=4, microbatches=8, **parameters):
    family = next(row for row in families() if row.name == name)
    return family.generate(ScheduleRequest(ranks, microbatches, parameters=parameters))


def expressible():
    found = []
    for family in families():
        try:
            schedule = family.generate(ScheduleRequest(4, 8))
            torch_csv(schedule)
        except (NotExpressible, InvalidArgument):
            continue
        found.append(schedule)
    return found


def torch_orders(text):
    from torch.distributed.pipelining.schedules import _Action

    return {rank: [_Action.from_str(cell) for cell in line] for rank, line in enumerate(csv.reader(io.StringIO(text)))}


def test_a_small_schedule_reads_as_torch_writes_it():
    assert torch_csv(one_f_one_b(2, 2)) == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


def test_a_fused_pair_stands_in_brackets():
    orders = (encode([Action(Kind.F, 0, 0), (Action(Kind.F, 0, 1), Action(Kind.B, 0, 0)), Action(Kind.B, 0, 1)]),)
    schedule = Schedule("custom", 2, np.array([[0]], dtype=np.int32), orders)
    assert torch_csv(schedule) == "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n"
    assert (parse_torch_csv(torch_csv(schedule)).orders[0] == orders[0]).all()


@pytest.mark.parametrize("schedule", expressible(), ids=lambda schedule: schedule.name)
def test_torchs_validator_accepts_every_schedule_that_its_grammar_holds(schedule):
    pytest.importorskip("torch")
    from torch.distributed.pipelining.schedules import _validate_schedule

    orders = torch_orders(torch_csv(schedule))
    mapping = _validate_schedule(orders, schedule.num_ranks, schedule.num_stages, schedule.num_microbatches)
    assert [mapping[stage] for stage in range(schedule.num_stages)] == schedule.placement[0].tolist()


@pytest.mark.parametrize("schedule", expressible(), ids=lambda schedule: schedule.name)
def test_torchs_simulator_runs_every_lowered_schedule(schedule):
    pytest.importorskip("torch")
    from torch.distributed.pipelining.schedules import _simulate_comms_compute

    if any(order[:, FUSED].any() for order in schedule.orders):
        pytest.skip("torch's simulator does not know its own fused pairs")
    lowered = lower(schedule, StageCosts.uniform(schedule.num_stages), data_parallel=True, merge="none")
    orders = torch_orders(torch_csv(lowered, csv_format="compute_comms"))
    compute = {rank: [a for a in steps if a.computation_type.name != "REDUCE_GRAD"] for rank, steps in orders.items()}
    placement = schedule.placement[0]
    _simulate_comms_compute(compute, lambda stage: int(placement[stage]), schedule.num_stages)


@pytest.mark.parametrize("schedule", expressible(), ids=lambda schedule: schedule.name)
def test_both_formats_come_back_as_they_went(schedule):
    lowered = lower(schedule, StageCosts.uniform(schedule.num_stages), data_parallel=True, zero=3, optimizer=False)
    for original, csv_format in ((schedule, "compute_only"), (lowered, "compute_comms")):
        back = parse_torch_csv(torch_csv(original, csv_format=csv_format))
        assert (back.placement == original.placement).all()
        assert back.num_microbatches == original.num_microbatches
        assert all((a == b).all() for a, b in zip(back.orders, original.orders, strict=True))
        if csv_format == "compute_comms":
            check_nccl(back)


@given(schedules(dag=False, slices=1, replicas=1))
@settings(max_examples=40)
def test_random_schedules_come_back_as_they_went(case):
    schedule, _, _ = case
    back = parse_torch_csv(torch_csv(schedule))
    assert all((a == b).all() for a, b in zip(back.orders, schedule.orders, strict=True))


def test_torchs_own_files_are_read():
    pytest.importorskip("torch")
    schedule = parse_torch_csv("0F0,,0F1,,0B0,0B1\n,1F0,1I0,1W0,1F1,1B1\n")
    assert schedule.text(1) == ["1F0", "1I0", "1W0", "1F1", "1B1"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: named("gems"), "2 replicas"),
        (lambda: _sliced(), "2 slices"),
        (lambda: replace(one_f_one_b(3, 3), edges=((0, 2), (1, 2))), "not a chain"),
        (lambda: replace(one_f_one_b(2, 2), weight_policy=WeightPolicy.STASH), "weights that change under way"),
        (lambda: lower(one_f_one_b(2, 2), StageCosts.uniform(2)), "SEND_F actions of rank 0"),
    ],
)
def test_what_the_grammar_lacks_is_refused_by_name(make, reason):
    with pytest.raises(NotExpressible, match=reason):
        torch_csv(make())


def _sliced():
    steps = [Action(kind, 0, 0, part) for kind, parts in ((Kind.F, (0, 1)), (Kind.B, (1, 0))) for part in parts]
    return Schedule("custom", 1, np.array([[0]], dtype=np.int32), (encode(steps),), num_slices=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0,0X1\n", "line 1, cell 2: '0X1' is not an action"),
        ("0F0,1F0\n1B0\n", "stage 1 stands on rank 0 and on rank 1"),
        ("0F0\n2F0\n", "stage 1 stands on no rank"),
        ("\n\n", "no action"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(text, words):
    with pytest.raises(InvalidSchedule, match=words):
        parse_torch_csv(text)
