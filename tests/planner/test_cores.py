"""Work on several cores: order of results, errors, and forked processes."""

from __future__ import annotations

import os
import threading

import pytest

from stagewright.planner import cores
from stagewright.planner.cores import on_cores


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "num_cores", lambda: 3)
    cores._helpers.cache_clear()


def test_results_keep_the_order_of_their_items_whoever_works_on_them(three_cores: None) -> None:
    together = threading.Barrier(3, timeout=30)
    workers: set[int] = set()

    def work(item: int) -> int:
        if item < 3:
            together.wait()  # passes only where three threads work at once
        workers.add(threading.get_ident())
        return item * item

    assert on_cores(work, range(40)) == [item * item for item in range(40)]
    assert len(workers) == 3
    assert threading.get_ident() in workers


@pytest.mark.parametrize("bad", [0, 7, 19])
def test_an_error_ends_the_work_and_is_raised(three_cores: None, bad: int) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == bad:
            raise ValueError(f"item {item}")
        done.append(item)

    with pytest.raises(ValueError, match=f"item {bad}"):
        on_cores(work, range(20))
    assert bad not in done
    assert on_cores(str, [1, 2, 3]) == ["1", "2", "3"]


def test_a_forked_process_has_helpers_of_its_own(three_cores: None) -> None:
    assert on_cores(str, range(8)) == [str(item) for item in range(8)]
    child = os.fork()
    if child == 0:
        os._exit(0 if on_cores(str, range(8)) == [str(item) for item in range(8)] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
