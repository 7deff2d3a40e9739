"""FlexPipe: programs that are known schedules, programs that cannot run, and exploration against every value."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.flexpipe import explore
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate

WARM = "min(D-d+a*(D-1-d),T)"
OPEN = f"F*{{{WARM}}} (B F)*{{T-{WARM}}} B*{{{WARM}}}"


def _program(text: str, num_ranks: int, num_microbatches: int, **options: object) -> Schedule:
    chunks = options.pop("num_chunks", None)
    request = ScheduleRequest(
        num_ranks, num_microbatches, num_chunks=chunks, parameters={"program": text, **options}  # type: ignore[arg-type]
    )  # fmt: skip
    return generate("flexpipe", request)


def _same(one: Schedule, other: Schedule) -> bool:
    return all(np.array_equal(left, right) for left, right in zip(one.orders, other.orders, strict=True))


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 1), (2, 1), (4, 3), (4, 8), (7, 20)])
def test_known_schedules_are_programs_of_a_line(num_ranks, num_microbatches):
    request = ScheduleRequest(num_ranks, num_microbatches)
    one_f_one_b = "F*{min(D-d,T)} (B F)*{T-min(D-d,T)} B*{min(D-d,T)}"
    assert _same(_program(one_f_one_b, num_ranks, num_microbatches), generate("1f1b", request))
    assert _same(_program("F*{T} B*{T}", num_ranks, num_microbatches), generate("gpipe", request))
    looped = _program("F*{T} F:1*{T} B:1*{T} B*{T}", num_ranks, num_microbatches, num_chunks=2)
    assert _same(looped, generate("breadth-first", ScheduleRequest(num_ranks, num_microbatches, num_chunks=2)))


def test_a_wave_of_split_backwards_is_simulated_as_written():
    text = "(F F:1)*{T} (I:1 W:1 I W)*{T}"
    schedule = _program(text, 3, 4, num_chunks=2, placement="wave")
    assert schedule.text(1)[:4] == ["1F0", "4F0", "1F1", "4F1"]
    assert simulate(schedule, StageCosts.uniform(6, num_chunks=2)).peak_memory().tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F*{D-d", "character 2 of 6"),
        ("F*2 B)", "character 6 of 6"),
        ("*3", "character 1 of 2"),
        ("(B F", "character 5 of 4"),
        ("G", "character 1 of 1"),
        ("F*{x}", "'x' is not an expression of d?"),
        ("F*{T//0}", "divides by 0"),
        ("F*{().__class__}", "is not an expression"),
        ("F*{2**99}", "is not an expression"),
        ("F:2", "chunk 2, the rank has 1"),
    ],
)
def test_a_wrong_program_is_refused_at_its_place(text, message):
    with pytest.raises(InvalidArgument, match=message.replace("of d?", "of ")):
        _program(text, 2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F*{T} B*{T-1}", "0"),
        ("(B F)*{T}", "0B0"),
        ("F*{T+1} B*{T+1}", "3"),
        ("F*{1+d} (B F)*{T-1-d} B*{1+d}", "deadlock"),
    ],
)
def test_a_program_that_cannot_run_is_refused_with_the_action(text, message):
    with pytest.raises(InvalidSchedule, match=message):
        _program(text, 2, 3)


@pytest.mark.parametrize("cap", [None, 4.0, 6.0])
def test_exploring_equals_trying_every_value(cap):
    costs = StageCosts.of(*np.random.default_rng(0).uniform(0.5, 1.5, (3, 4)))
    request = ScheduleRequest(4, 12, costs=costs, latency_s=0.7, memory_cap=cap, parameters={"program": OPEN})
    found = explore(request, {"a": range(-3, 4)})
    times = {}
    for value in range(-3, 4):
        try:
            schedule = _program(OPEN, 4, 12, a=value)
        except (InvalidArgument, InvalidSchedule):
            continue
        if cap is None or peak_activations(schedule, costs).max() <= cap:
            times[value] = simulate(schedule, costs, links=Links(latency_s=0.7)).makespan_s
    assert found.num_valid == len(times)
    assert found.makespan_s == min(times.values())
    assert times[found.values["a"]] == pytest.approx(found.makespan_s)
    with pytest.raises(InvalidArgument, match="none of 2 combinations"):
        explore(ScheduleRequest(4, 12, costs=costs, memory_cap=0.5, parameters={"program": OPEN}), {"a": [0, 1]})
