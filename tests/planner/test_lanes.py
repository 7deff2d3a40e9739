"""Work in forks of this process: who answers what, errors, stops and deaths."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

import pytest

from stagewright.planner.lanes import Lanes


class Meeting:
    """Has each lane begin one answer before any gives its first: else a quick one may take all that there is to do."""

    def __init__(self, lanes: int) -> None:
        self.barrier = multiprocessing.get_context("fork").Barrier(lanes, timeout=60.0)
        self.is_over = False  # in this process

    def wait(self) -> None:
        if not self.is_over:
            self.barrier.wait()
            self.is_over = True


class Counting:
    """Answers (owner, number) with the process, and how many of the owner's requests were answered there."""

    def __init__(self, meeting: Meeting | None = None) -> None:
        self.seen: Counter[str] = Counter()
        self.meeting = meeting

    def __call__(self, request: tuple[str, int]) -> tuple[int, int, int]:
        owner, number = request
        if number < 0:
            raise ValueError(f"number {number} of {owner}")
        if self.meeting is not None:
            self.meeting.wait()
        self.seen[owner] += 1
        return os.getpid(), self.seen[owner], number


def asked(*owners: str) -> list[tuple[str, tuple[str, int]]]:
    return [(owner, (owner, place)) for place, owner in enumerate(owners)]


def test_an_owner_stays_in_one_lane_and_answers_keep_their_order() -> None:
    counting = Counting()
    with Lanes(counting, most=3, forks_after_s=0.0) as lanes:
        lanes.answers(asked("a"))
        counting.meeting = Meeting(3)
        first = lanes.answers(asked("a", "b", "c", "d", "a", "b", "c", "d"))
        second = lanes.answers(asked("d", "c", "b", "a"))
        assert lanes.have_forked
    assert [number for _, _, number in first] == list(range(8))
    assert len({process for process, _, _ in first}) == 3
    assert os.getpid() in {process for process, _, _ in first}
    lane_of = dict(zip("abcd", (process for process, _, _ in first), strict=False))
    assert [process for process, _, _ in second] == [lane_of[owner] for owner in "dcba"]
    # What `a` left before there were forks is known in whichever lane has it now.
    assert [seen for _, seen, _ in first] == [2, 1, 1, 1, 3, 2, 2, 2]
    assert [seen for _, seen, _ in second] == [3, 3, 3, 4]


def test_little_work_is_done_here() -> None:
    with Lanes(Counting(), most=3, forks_after_s=60.0) as lanes:
        answers = [process for _ in range(3) for process, _, _ in lanes.answers(asked("a", "b"))]
        assert not lanes.have_forked
    assert set(answers) == {os.getpid()}


@pytest.mark.parametrize("owners", ["ab", "ba"])
def test_an_error_in_any_lane_is_raised_here(owners: str) -> None:
    with Lanes(Counting(Meeting(2)), most=2, forks_after_s=-1.0) as lanes:
        lanes.answers(asked("a", "b"))
        with pytest.raises(ValueError, match="number -1 of b"):
            lanes.answers([(owner, (owner, -1 if owner == "b" else 0)) for owner in owners])


def test_a_lane_that_dies_is_done_without() -> None:
    with Lanes(Counting(Meeting(2)), most=2, forks_after_s=-1.0) as lanes:
        (other,) = {process for process, _, _ in lanes.answers(asked("a", "b"))} - {os.getpid()}
        os.kill(other, signal.SIGKILL)
        answers = lanes.answers(asked("a", "b", "a", "b"))
        assert [number for _, _, number in answers] == [0, 1, 2, 3]
        assert {process for process, _, _ in answers} == {os.getpid()}
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


class Pacing:
    """Answers (owner, seconds in this process, seconds in a fork) with the process and how many of the owner's were answered."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self.seen: Counter[Hashable] = Counter()

    def __call__(self, request: tuple[str, float, float]) -> tuple[int, int]:
        owner, here_s, there_s = request
        time.sleep(here_s if os.getpid() == self.parent else there_s)
        self.seen[owner] += 1
        return os.getpid(), self.seen[owner]

    def give_up(self, owner: Hashable) -> int:
        return self.seen.pop(owner)

    def take_over(self, owner: Hashable, known: int) -> None:
        self.seen[owner] = known


@pytest.mark.parametrize(("here_s", "there_s"), [(2.0, 0.1), (0.1, 2.0)])
def test_an_owner_moves_with_what_is_known_of_it_where_a_lane_would_wait(here_s: float, there_s: float) -> None:
    pacing = Pacing()
    with Lanes(pacing, most=2, forks_after_s=0.0, memory=pacing) as lanes:
        first = lanes.answers([(owner, (owner, here_s, there_s)) for owner in "abcd"])
        lanes.answers([(owner, (owner, 0.1, 0.1)) for owner in "bcd"])  # in one lane, of whose pace nothing was known
        third = lanes.answers([(owner, (owner, 0.1, 0.1)) for owner in "bcd"])
    assert len({process for process, _ in first}) == 2
    assert len({process for process, _ in third}) == 2
    assert [seen for _, seen in third] == [3, 3, 3]


@pytest.mark.parametrize(("here_s", "there_s"), [(2.0, 0.1), (0.1, 2.0)])
def test_an_owner_of_a_lane_that_died_begins_anew(here_s: float, there_s: float) -> None:
    pacing = Pacing()
    with Lanes(pacing, most=2, forks_after_s=0.0, memory=pacing) as lanes:
        first = lanes.answers([(owner, (owner, here_s, there_s)) for owner in "abcd"])
        lanes.answers([(owner, (owner, 0.1, 0.1)) for owner in "abcd"])
        other = next(process for process, _ in first if process != os.getpid())
        os.kill(other, signal.SIGKILL)
        last = lanes.answers([(owner, (owner, 0.0, 0.0)) for owner in "abcd"])
    assert {process for process, _ in last} == {os.getpid()}
    begun_there = [process == other for process, _ in first]
    assert all(seen == 1 for (_, seen), was_there in zip(last, begun_there, strict=True) if was_there)


class Books:
    """What processes wrote, by process; each fork leaves its own."""

    def __init__(self) -> None:
        self.pages: dict[int, list[int]] = {}

    def write(self, request: tuple[str, int]) -> int:
        self.pages.setdefault(os.getpid(), []).append(request[1])
        return os.getpid()

    def left(self) -> dict[int, list[int]]:
        return {os.getpid(): self.pages.get(os.getpid(), [])}

    def take(self, left: dict[int, list[int]]) -> None:
        self.pages |= left


def test_forks_leave_at_the_end_what_they_made() -> None:
    books, meeting = Books(), Meeting(2)

    def answer(request: tuple[str, int]) -> int:
        meeting.wait()
        return books.write(request)

    with Lanes(answer, most=2, forks_after_s=0.0, legacy=books) as lanes:
        meeting.is_over = True
        lanes.answers(asked("a"))
        meeting.is_over = False
        writers = lanes.answers(asked("b", "c", "d"))
    assert len(books.pages) == 2
    for writer in set(writers):
        here = [place for place, other in enumerate(writers) if other == writer]
        assert books.pages[writer][-len(here) :] == here


def test_a_fork_that_died_and_one_that_is_to_end_leave_nothing() -> None:
    for is_stopped in (False, True):
        books, meeting = Books(), Meeting(2)

        def answer(request: tuple[str, int], books: Books = books, meeting: Meeting = meeting) -> int:
            meeting.wait()
            return books.write(request)

        with Lanes(answer, lambda stopped=is_stopped: stopped, most=2, forks_after_s=0.0, legacy=books) as lanes:
            meeting.is_over = True
            lanes.answers(asked("a"))
            meeting.is_over = False
            writers = lanes.answers(asked("b", "c"))
            assert len(set(writers)) == 2
            if not is_stopped:
                os.kill(next(writer for writer in writers if writer != os.getpid()), signal.SIGKILL)
        assert set(books.pages) == {os.getpid()}


def test_a_stop_reaches_every_lane() -> None:
    begin_s = time.monotonic()
    lanes: Lanes[str, tuple[int, float]]
    meeting = Meeting(2)

    def wait(owner: str) -> tuple[int, float]:
        meeting.wait()
        while not lanes.should_stop() and time.monotonic() - begin_s < 60.0:
            time.sleep(0.001)
        return os.getpid(), time.monotonic() - begin_s

    with Lanes(wait, lambda: time.monotonic() - begin_s > 0.5, most=2, forks_after_s=-1.0) as lanes:
        answers = lanes.answers([("a", "a"), ("b", "b")])
        assert len({process for process, _ in answers}) == 2
        assert all(0.5 < seconds < 30.0 for _, seconds in answers)
        # The stop was of those answers: a lane is asked again as before.
        assert len({process for process, _ in lanes.answers([("a", "a"), ("b", "b")])}) == 2


def test_forks_end_with_their_context_and_with_this_process(tmp_path: Path) -> None:
    with Lanes(Counting(Meeting(2)), most=2, forks_after_s=-1.0) as lanes:
        (other,) = {process for process, _, _ in lanes.answers(asked("a", "b"))} - {os.getpid()}
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)
    note = tmp_path / "fork"
    parent = os.fork()
    if parent == 0:
        try:
            lanes = Lanes(Counting(Meeting(2)), most=2, forks_after_s=-1.0)
            (other,) = {process for process, _, _ in lanes.answers(asked("a", "b"))} - {os.getpid()}
            note.write_text(str(other))
        finally:  # whatever happened: tests go on in one process
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    other = int(note.read_text())
    for _ in range(1000):
        if not _is_running(other):
            return
        time.sleep(0.01)
    raise AssertionError("a fork outlived its parent")


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
