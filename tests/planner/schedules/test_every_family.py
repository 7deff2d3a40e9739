"""Every generator on random sizes: a message that states the rule, or a schedule that the validator accepts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import typeof

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules import list_scheduling
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import family, generate
from stagewright.planner.simulation.kernel import compile_order, makespan
from stagewright.planner.simulation.validate import validate
from tests.planner.schedules.test_registry import SYNCHRONOUS

CHUNKED = {"interleaved", "breadth-first", "interleaved-zb"}
SLICED = {"terapipe", "seq1f1b"}


@st.composite
def requests(draw: st.DrawFn, name: str, most_ranks: int, most_microbatches: int) -> ScheduleRequest:
    """Return a request with random sizes, uneven costs, latency and, sometimes, a cap."""
    ranks = draw(st.integers(1, most_ranks))
    microbatches = draw(st.integers(1, most_microbatches))
    chunks, waves = family(name).default_chunks, None
    if name in CHUNKED:
        chunks = draw(st.integers(2, 4))
    if name == "wave":
        waves = draw(st.integers(1, 3))
        chunks = 2 * waves
    seed = draw(st.integers(0, 2**16))
    random = np.random.default_rng(seed)
    stages = ranks * chunks
    costs = StageCosts.of(
        *(random.uniform(0.5, 1.5, stages) / chunks for _ in range(3)),
        activation=random.uniform(0.5, 1.5, stages) / chunks,
    )
    return ScheduleRequest(
        ranks,
        microbatches,
        num_chunks=chunks if name in CHUNKED else None,
        num_waves=waves,
        num_slices=draw(st.integers(1, 4)) if name in SLICED else 1,
        costs=draw(st.sampled_from([costs, None])),
        latency_s=draw(st.sampled_from([0.0, 0.1, 1.0])),
        memory_cap=draw(st.sampled_from([None, None, 0.9 * ranks, 2.0])),
        parameters={"effort": draw(st.sampled_from([0.0, 0.05]))},
    )


def check(name: str, request: ScheduleRequest) -> None:
    try:
        schedule = generate(name, request)
    except InvalidArgument as refusal:
        assert any(character.isdigit() for character in refusal.message), refusal.message
        assert refusal.field
        return
    costs = request.costs or StageCosts.uniform(
        schedule.num_stages, num_chunks=max(1, schedule.num_stages // schedule.num_ranks)
    )
    validate(schedule, costs=costs, memory_cap=request.memory_cap)
    seconds = costs.forward_s, costs.input_grad_s, costs.weight_grad_s
    work_s = float(sum(seconds).sum()) * request.num_microbatches
    assert makespan(compile_order(schedule), *seconds, request.latency_s) >= work_s / schedule.num_ranks - 1e-6


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_every_request_is_refused_with_a_number_or_answered_validly(name: str) -> None:
    @settings(max_examples=60)
    @given(requests(name, 6, 16))
    def run(request: ScheduleRequest) -> None:
        check(name, request)

    run()


@pytest.mark.soak
@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_every_large_request_is_refused_with_a_number_or_answered_validly(name: str) -> None:
    @settings(max_examples=1000)
    @given(requests(name, 16, 64))
    def run(request: ScheduleRequest) -> None:
        check(name, request)

    run()


@pytest.mark.parametrize("name", SYNCHRONOUS)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 1), (1, 5), (2, 1), (5, 2), (6, 24)])
def test_the_smallest_sizes_are_answered_or_refused(name: str, num_ranks: int, num_microbatches: int) -> None:
    check(name, ScheduleRequest(num_ranks, num_microbatches))


def test_the_decoder_of_greedy_orders_is_compiled_in_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, forms = list_scheduling._decode, []

    def noted(*arguments: object) -> list_scheduling.Words:
        forms.append(typeof(arguments))
        return decode(*arguments)

    monkeypatch.setattr(list_scheduling, "_decode", noted)
    for name in ("gems", "wave", "chimera", "1f1b-v"):
        check(name, ScheduleRequest(4, 8))
    assert len(forms) >= 4
    assert len(set(forms)) == 1
