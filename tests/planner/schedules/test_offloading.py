"""PipeOffload and OptPipe: fewest moves, the ledger's peaks, and the integer programme against every order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.opt_pipe import Answer, deepest_warmup, descended, opt_pipe, seconds, solve
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.schedules.pipe_offload import held, least_held, offloads
from stagewright.planner.schedules.registry import generate
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate


def _orders(rank: int, count: int) -> Iterator[np.ndarray]:
    """Yield every order of F and B of one stage that keeps the microbatches in order."""
    for backward_places in itertools.combinations(range(2 * count), count):
        kinds = [int(place in backward_places) for place in range(2 * count)]
        ahead = np.cumsum([1 - 2 * kind for kind in kinds])
        if (ahead >= 0).all():
            seen = [0, 0]
            rows = []
            for kind in kinds:
                rows.append((kind, 0, rank, seen[kind], -1, 0))
                seen[kind] += 1
            yield np.array(rows, dtype=np.int32)


def _subsets(count: int) -> Iterator[frozenset[int]]:
    for size in range(count + 1):
        yield from (frozenset(chosen) for chosen in itertools.combinations(range(count), size))


@pytest.mark.parametrize("most", [2, 3, 4])
def test_no_smaller_set_of_moves_keeps_the_cap(most):
    for order in _orders(0, 5):
        if least_held(order) <= most:
            chosen = offloads(order, most)
            assert max(held(order, chosen)) <= most
            assert len(chosen) == min(len(each) for each in _subsets(5) if max(held(order, each)) <= most)


@pytest.mark.parametrize(("num_ranks", "cap"), [(4, 3), (8, 4), (8, 5), (8, 8), (12, 7)])
def test_half_the_activations_leave_at_the_makespan_of_1f1b(num_ranks, cap):
    """The paper: half of the activations and more can be moved at next to no cost; a move takes at most an action here."""
    request = ScheduleRequest(num_ranks, 3 * num_ranks, memory_cap=float(cap))
    costs = StageCosts.uniform(num_ranks)
    schedule = generate("pipeoffload", request)
    validate(schedule)
    timeline = simulate(schedule, costs, links=Links(host_latency_s=0.9))
    plain = simulate(generate("1f1b", ScheduleRequest(num_ranks, 3 * num_ranks)), costs)
    assert timeline.makespan_s == plain.makespan_s
    assert timeline.peak_memory().max() == cap
    assert (timeline.peak_memory() == np.minimum(plain.peak_memory(), cap)).all()
    assert peak_activations(schedule, costs).tolist() == timeline.peak_memory().tolist()


def test_a_slow_host_link_makes_it_longer():
    costs = StageCosts.uniform(8)
    schedule = generate("pipeoffload", ScheduleRequest(8, 24, memory_cap=5.0))
    assert simulate(schedule, costs, links=Links(host_latency_s=9.0)).makespan_s > simulate(schedule, costs).makespan_s


def test_a_cap_below_what_offloading_reaches_names_both_numbers():
    with pytest.raises(InvalidArgument, match=r"rank 0 holds \d+ with everything moved that can be, the cap is 2"):
        generate("pipeoffload", ScheduleRequest(8, 24, memory_cap=2.0))
    with pytest.raises(InvalidArgument, match=r"the memory cap is 0.5, one microbatch on one rank holds 1"):
        generate("optpipe", ScheduleRequest(2, 4, memory_cap=0.5))


def _least_s(costs: StageCosts, count: int, latency_s: float, cap: int) -> float:
    """Return the least makespan over every order of F and B and every set of moves that keep the cap."""
    fitting = [
        [order for order in _orders(rank, count) if min(max(held(order, each)) for each in _subsets(count)) <= cap]
        for rank in range(costs.num_stages)
    ]
    best = math.inf
    for orders in itertools.product(*fitting):
        try:
            best = min(best, seconds(Answer(orders, ()), costs, latency_s))
        except InvalidSchedule:
            continue  # these orders wait for each other
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_integer_programme_equals_every_order_and_every_set_of_moves(seed):
    rng = np.random.default_rng(seed)
    costs = StageCosts.of(*rng.uniform(0.5, 1.5, (3, 2)))
    latency_s, cap = float(rng.choice([0.0, 0.5, 1.5, 3.0])), 1 + seed % 3
    schedule = opt_pipe(ScheduleRequest(2, 4, costs=costs, latency_s=latency_s, memory_cap=float(cap)))
    validate(schedule)
    timeline = simulate(schedule, costs, links=Links(latency_s=latency_s, host_latency_s=0.4))
    assert timeline.makespan_s == pytest.approx(_least_s(costs, 4, latency_s, cap))
    assert timeline.peak_memory().max() <= cap
    heuristic = deepest_warmup(costs, 4, latency_s, np.full(2, cap))
    assert timeline.makespan_s <= seconds(heuristic, costs, latency_s) * (1 + 1e-9)


def test_the_descent_meets_the_programme_in_most_small_cases_and_is_never_slower_than_warmups():
    met = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        ranks, count = ((2, 6), (3, 4), (2, 5), (3, 4))[seed % 4]
        costs = StageCosts.of(*rng.uniform(0.5, 1.5, (3, ranks)))
        latency_s, caps = float(rng.choice([0.0, 0.5, 1.5, 3.0])), np.full(ranks, 1 + seed % 3)
        start = deepest_warmup(costs, count, latency_s, caps)
        found = descended(start, costs, latency_s, caps, tries=1000)
        start_s, found_s = seconds(start, costs, latency_s), seconds(found, costs, latency_s)
        best = solve(costs, count, latency_s, caps, most_s=found_s)
        assert best is not None
        best_s = seconds(best, costs, latency_s)
        assert best_s * (1 - 1e-6) <= found_s <= start_s
        for answer, (rank, cap) in itertools.product((found, best), enumerate(caps.tolist())):
            assert max(held(answer.orders[rank], answer.moved[rank])) <= cap
        met.append(found_s <= best_s * (1 + 1e-6))
    assert sum(met) >= 8


def test_beyond_the_programme_the_descent_mostly_shortens_what_warmups_give():
    shorter = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        ranks = int(rng.integers(2, 7))
        count = int(rng.integers(ranks, 3 * ranks + 1))
        costs = StageCosts.of(*rng.uniform(0.5, 1.5, (3, ranks)))
        latency_s = float(rng.choice([0.0, 0.5, 1.5, 3.0]))
        cap = max(2, ranks // 2 + int(rng.integers(0, 3)))
        schedule = opt_pipe(ScheduleRequest(ranks, count, costs=costs, latency_s=latency_s, memory_cap=float(cap)))
        validate(schedule)
        timeline = simulate(schedule, costs, links=Links(latency_s=latency_s, host_latency_s=0.4))
        assert timeline.peak_memory().max() <= cap
        start_s = seconds(deepest_warmup(costs, count, latency_s, np.full(ranks, cap)), costs, latency_s)
        assert timeline.makespan_s <= start_s * (1 + 1e-9)
        shorter.append(timeline.makespan_s < start_s * (1 - 1e-6))
    assert sum(shorter) >= 3


def test_moves_pay_for_the_forwards_that_cover_a_hop():
    """Under 1F1B's own cap, moves allow more forwards ahead: a step at a hop of 3 F takes an eighth less."""
    costs = StageCosts.uniform(4)
    request = ScheduleRequest(4, 24, costs=costs, latency_s=3.0, memory_cap=4.0)
    links = Links(latency_s=3.0)
    schedule = generate("optpipe", request)
    plain = simulate(generate("1f1b", request), costs, links=links)
    moved = simulate(schedule, costs, links=links)
    assert moved.peak_memory().max() <= plain.peak_memory().max() == 4.0
    assert moved.makespan_s < 0.88 * plain.makespan_s
    assert schedule.parameters["moved_activations"] > 0
