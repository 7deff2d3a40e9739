"""A watch reports what is allocated and released while it is on, whatever was watched before."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from threading import Thread

import pytest
import torch

from stagewright.modeling.allocations import mark, watch_allocations

# More than malloc keeps in a new process: what is released goes back to the system, whose next loan is at the same address.
SIZE = 1 << 26


@pytest.fixture(scope="module")
def new_process():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        yield lambda work: executor.submit(work).result(timeout=120)


def block(size=SIZE):
    return torch.empty(size, dtype=torch.uint8)


def sizes(work):
    return [change.size for change in watch_allocations(work).changes]


def test_changes_come_in_order_with_marks_between():
    def work():
        first = block()
        with mark("second"):
            second = block(SIZE // 2)
        del first, second

    watch = watch_allocations(work)
    (second,) = watch.marks
    assert [change.size for change in watch.changes] == [SIZE, SIZE // 2, -SIZE, -SIZE // 2]
    assert second.name == "second"
    assert [second.begin_us <= change.time_us <= second.end_us for change in watch.changes] == [
        False,
        True,
        False,
        False,
    ]
    assert {change.thread for change in watch.changes} == {second.thread}


def lend_anew_between_watches():
    held = []
    lent = sizes(lambda: held.append(block()))
    address = held.pop().data_ptr()  # unwatched
    held.append(block())
    return held[0].data_ptr() == address, lent, sizes(held.clear)


def release_on_a_thread_without_the_profiler():
    addresses = []

    def work():
        held = [block()]
        addresses.append(held[0].data_ptr())
        thread = Thread(target=held.clear)
        thread.start()
        thread.join()
        addresses.append(block().data_ptr())

    return sizes(work), addresses


def test_a_release_of_what_was_lent_anew_between_watches_does_not_count(new_process):
    same_address, lent, released = new_process(lend_anew_between_watches)
    assert same_address
    assert lent == [SIZE]
    assert released == []


def test_a_release_on_a_thread_without_the_profiler_counts_when_the_address_is_lent_again(new_process):
    changes, (first, second) = new_process(release_on_a_thread_without_the_profiler)
    assert first == second
    assert changes == [SIZE, -SIZE, SIZE, -SIZE]


@pytest.mark.parametrize("level", ["99", None])
def test_the_users_log_level_is_left_as_it_was(monkeypatch, level):
    if level is None:
        monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    else:
        monkeypatch.setenv("KINETO_LOG_LEVEL", level)
    assert sizes(lambda: None) == []
    assert os.environ.get("KINETO_LOG_LEVEL") == level
