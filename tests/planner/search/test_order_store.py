"""What searches share of orders: made once, forgotten by bytes, never part of an answer."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from stagewright.planner.documents import Recompute, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.search import order_store
from stagewright.planner.search.exact import solve
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.order import OrderKey
from stagewright.planner.search.order_store import OrderStore, bytes_of
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import RULES
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory
from tests.planner.search.random_problems import random_problem


def _counted(monkeypatch) -> list[OrderKey]:
    made: list[OrderKey] = []
    generate = order_store._generated

    def counting(key, rule):
        made.append(key)
        return generate(key, rule)

    monkeypatch.setattr(order_store, "_generated", counting)
    return made


def test_a_second_search_makes_no_order_and_answers_the_same(monkeypatch):
    made = _counted(monkeypatch)
    store = OrderStore()
    monkeypatch.setattr("stagewright.planner.search.problem.ORDERS", store)
    first = solve(random_problem(4), Limits(gap=0.0))
    assert made
    made.clear()
    second = solve(random_problem(4), Limits(gap=0.0))
    assert made == []
    assert first == second


def test_what_a_fork_made_is_kept_where_it_came_from(monkeypatch):
    """A second search made half of the orders again: those that its fork had closed."""
    key, other = OrderKey("1f1b", 2, 4, 1), OrderKey("1f1b", 2, 6, 1)
    rule = next(rule for rule in RULES if rule.name == "1f1b")
    store = OrderStore()
    store.order(key, rule)
    store.begin_fork()
    assert store.left() == []
    made = store.order(other, rule)
    left = store.left()
    assert {place[1] for place, _ in left} == {other}
    origin = OrderStore()
    origin.take(left)
    origin.take(left)
    assert origin.order(other, rule) is made
    assert origin.num_bytes == sum(bytes_of(found) for _, found in left)
    monkeypatch.setattr(order_store, "MOST_LEFT_BYTES", bytes_of(made))
    assert [found for _, found in store.left()] == [made]


def test_a_fork_finds_the_store_open_whatever_a_thread_does():
    key, rule = OrderKey("1f1b", 2, 4, 1), next(rule for rule in RULES if rule.name == "1f1b")
    with order_store.ORDERS._lock:  # as a thread holds it at the moment of the fork
        fork = os.fork()
        if fork == 0:
            signal.alarm(60)
            try:
                order_store.ORDERS.order(key, rule)
                os._exit(0)
            finally:  # whatever happened: tests go on in one process
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0


def test_what_was_not_asked_for_the_longest_time_goes_first(monkeypatch):
    made = _counted(monkeypatch)
    rule = next(rule for rule in RULES if rule.name == "1f1b")
    keys = [OrderKey("1f1b", 4, count, 1) for count in (8, 9, 10)]
    sizes = [bytes_of(OrderStore().exact_order(key, rule)) for key in keys]
    store = OrderStore(most_bytes=sizes[0] + sizes[2])
    for key in (keys[0], keys[1], keys[0], keys[2]):
        store.exact_order(key, rule)
    assert store.num_bytes == sizes[0] + sizes[2]
    made.clear()
    store.exact_order(keys[0], rule)
    store.exact_order(keys[2], rule)
    assert made == []
    store.exact_order(keys[1], rule)
    assert made == [keys[1]]


def test_orders_hold_the_live_vectors_of_all_their_microbatches():
    compared = set()
    for rule in RULES:
        for ranks, count in ((2, 13), (4, 24), (4, 40)):
            for chunks in rule.chunks(2):
                if not rule.fits(ranks, count, chunks):
                    continue
                key = OrderKey(rule.name, ranks, count, chunks)
                order, exact = OrderStore().order(key, rule), OrderStore().exact_order(key, rule)
                assert np.array_equal(order.before, exact.before)
                for some, all_of_them in zip(order.live, exact.live, strict=True):
                    assert sorted(some.tolist()) == sorted(all_of_them.tolist()), key
                compared.add(rule.name)
    assert compared == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", ["gpipe", "breadth-first"])
def test_a_schedule_that_holds_every_microbatch_pays_for_every_microbatch(name):
    """24 microbatches on 2 ranks; 8 of them, where others repeat, would fit without recomputation."""
    profile = profile_factory(8, activation_bytes=8e6, parameters=1_000_000, microbatches=(1,))
    cluster = cluster_factory(2, memory_bytes=6e8)
    space = SearchSpace(schedules=(name,), memory_headroom=0.0, pins=Pins(microbatch=1, pp=2))
    job = TrainingJob(global_batch=24, sequence_length=128, precision="fp32", space=space)
    problem = Problem(profile, cluster, job, 2)
    outcome = solve(problem, Limits())
    assert outcome.plan is not None
    assert max(outcome.plan.prediction.peak_memory_bytes) <= problem.capacity_bytes
    none = space.model_copy(update={"recompute": (Recompute.NONE,)})
    assert solve(replace(problem, job=job.model_copy(update={"space": none})), Limits()).plan is None
