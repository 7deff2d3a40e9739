"""Work on the cores of this machine in forks of this process, where threads would wait for the interpreter's lock.

Requests belong to owners. All requests of an owner go to one lane, one after the other, so what answers them may keep what it
learns of an owner. Where that and the request are all that an answer depends on, answers are the same with any number of lanes.
An owner's first requests go to the lane that is free first. Before later ones owners move, with what is known of them, where one
lane would be done long before another, by what their requests took the last time.

The first lane is this process. The others are forked from it when enough work has been seen to pay for it: they begin with all that
this process knows, compiled functions too, and share its memory until either writes. A fork runs nothing but `answer`, holds no
lock of another thread, and ends with its pipe. What a lane that died had to do is done here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, Generic, NamedTuple, NoReturn, Protocol, TypeVar

from stagewright.planner.cores import num_cores
from stagewright.planner.forks import end_fork, start_fork

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Left = TypeVar("Left")
Known = TypeVar("Known")
Asked = list[tuple[int, Request]]  # requests with their places

FORKS_AFTER_S = 0.03  # of work: a fork takes about a third of it
MOVES_FOR_S = 0.03  # that an owner's move saves, at least: it takes about a third of it
_POLL_S = 0.02
_LEAVE = "leave"


class Memory(Protocol[Known]):
    """What answers are made from and keep of owners, one apart from the other."""

    def give_up(self, owner: Hashable) -> Known:
        """Forget what is known of an owner, and return it; travels by pickle."""

    def take_over(self, owner: Hashable, known: Known) -> None:
        """Know of an owner what another lane did."""


class Answered(NamedTuple, Generic[Answer]):
    """An answer, the place of its request, and the seconds that it took."""

    place: int
    answer: Answer
    seconds: float


class _Give(NamedTuple):
    """Asks a fork to give an owner up."""

    owner: Hashable


class _Take(NamedTuple):
    """Asks a fork to take an owner over."""

    owner: Hashable
    known: object


class Legacy(Protocol[Left]):
    """What forks make that later work of this process can do with."""

    def left(self) -> Left:
        """Return what this fork has made; travels by pickle."""

    def take(self, left: Left) -> None:
        """Take over what a fork has made."""


class Lanes(Generic[Request, Answer]):
    """Answers requests here and in forks; a context, which ends the forks.

    Parameters
    ----------
    answer : of a request, here and in forks; both travel by pickle.
    should_stop : asked while others work; forks ask `Lanes.should_stop`, which then is true there too.
    most : lanes, this process among them; None for one a core.
    forks_after_s : seconds of work before there are any; None for FORKS_AFTER_S.
    legacy : what each fork leaves to this process at the end, unless the work is to end: made there, and taken over here.
    memory : of owners, where it can move; None where owners stay in the lanes that had their first requests.
    """

    def __init__(
        self,
        answer: Callable[[Request], Answer],
        should_stop: Callable[[], bool] | None = None,
        *,
        most: int | None = None,
        forks_after_s: float | None = None,
        legacy: Legacy[Any] | None = None,
        memory: Memory[Any] | None = None,
    ) -> None:
        self._answer = answer
        self._legacy = legacy
        self._memory = memory
        self._should_stop = should_stop
        self._most = most
        self._forks_after_s = FORKS_AFTER_S if forks_after_s is None else forks_after_s
        self._seconds = 0.0  # of work here, until there are forks
        self._forks: list[_Fork] = []
        self._lane_of: dict[Hashable, _Fork | None] = {}  # None is this process
        self._pace_s: dict[Hashable, float] = {}  # of a request of an owner, the last time
        self._parent: Connection | None = None  # in a fork
        self._tokens = _Tokens()

    def __enter__(self) -> Lanes[Request, Answer]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None and self._legacy is not None and not self.should_stop():
            self._inherit(self._legacy)
        for fork in self._forks:
            fork.end()
        self._forks.clear()
        self._tokens.close()

    @property
    def have_forked(self) -> bool:
        """Whether there was enough work to pay for other lanes."""
        return self._forks_after_s == float("inf")

    def should_stop(self) -> bool:
        """Tell whether the work is to end: in a fork, when something came through its pipe while it works."""
        if self._parent is not None:
            return self._parent.poll()
        return self._should_stop is not None and self._should_stop()

    def answers(self, requests: Sequence[tuple[Hashable, Request]]) -> list[Answer]:
        """Return the answers of (owner, request) in their order; raises what `answer` raises."""
        if not requests:
            return []
        groups: dict[Hashable, Asked[Request]] = {}
        for place, (owner, request) in enumerate(requests):
            groups.setdefault(owner, []).append((place, request))
        if len(groups) > 1 and not self._forks and self._seconds >= self._forks_after_s:
            self._fork()
        if not self._forks:
            answered = self._answered([(place, request) for place, (_, request) in enumerate(requests)])
            found = {each.place: each for each in answered}
        else:
            found = self._shared(groups)
        for owner, asked in groups.items():
            self._pace_s[owner] = sum(found[place].seconds for place, _ in asked) / len(asked)
        return [found[place].answer for place in range(len(requests))]

    def _shared(self, groups: dict[Hashable, Asked[Request]]) -> dict[int, Answered[Answer]]:
        """Return the answers by place: every lane has those of its owners to do, then takes new owners one by one."""
        if self._memory is not None and all(owner in self._lane_of for owner in groups):
            self._even_out({owner: self._pace_s[owner] * len(asked) for owner, asked in groups.items()}, self._memory)
        new = [asked for owner, asked in groups.items() if owner not in self._lane_of]
        self._tokens.put(len(new))
        own: dict[_Fork | None, Asked[Request]] = {lane: [] for lane in (None, *self._forks)}
        for owner, asked in groups.items():
            if owner in self._lane_of:
                own[self._lane_of[owner]] += asked
        for fork in self._forks:
            fork.ask(own[fork], new)
        by_lane: dict[_Fork | None, list[Answered[Answer]]] = {None: self._worked(own[None], new)}
        for fork in self._forks:
            by_lane[fork] = self._received(fork)
        self._bury()
        found = {each.place: each for answered in by_lane.values() for each in answered}
        lane_of_place = {each.place: lane for lane, answered in by_lane.items() for each in answered}
        for owner, asked in groups.items():
            lost = self._answered([(place, request) for place, request in asked if place not in found])
            found |= {each.place: each for each in lost}
            self._lane_of.setdefault(owner, lane_of_place.get(asked[0][0]))  # what was lost is done here
        return found

    def _even_out(self, seconds: dict[Hashable, float], memory: Memory[Any]) -> None:
        """Move owners to where less is expected, one by one, as long as that saves enough; `seconds` is what each will take."""
        lanes: list[_Fork | None] = [None, *self._forks]
        while True:
            expected = {
                lane: sum(seconds[owner] for owner in seconds if self._lane_of[owner] is lane) for lane in lanes
            }
            most, least = max(lanes, key=expected.__getitem__), min(lanes, key=expected.__getitem__)
            apart_s = expected[most] - expected[least]
            saves = {
                owner: min(own_s, apart_s - own_s) for owner, own_s in seconds.items() if self._lane_of[owner] is most
            }
            chosen = max(saves, key=saves.__getitem__, default=None)
            if chosen is None or saves[chosen] < MOVES_FOR_S or not self._moved(chosen, most, least, memory):
                return

    def _moved(self, owner: Hashable, source: _Fork | None, target: _Fork | None, memory: Memory[Any]) -> bool:
        """Move an owner between lanes; False where one of them died, and the owner is done here: anew, if that was its own."""
        self._lane_of[owner] = None
        try:
            if source is None:
                known = memory.give_up(owner)
            else:
                source.pipe.send(_Give(owner))
                known = source.pipe.recv()
        except (EOFError, OSError):
            return False
        if target is None:
            memory.take_over(owner, known)
            return True
        try:
            target.pipe.send(_Take(owner, known))
        except OSError:
            memory.take_over(owner, known)
            return False
        self._lane_of[owner] = target
        return True

    def _worked(self, own: Asked[Request], new: Sequence[Asked[Request]]) -> list[Answered[Answer]]:
        """Return the answers of a lane's own requests, and of those of new owners that no other lane took before."""
        found = self._answered(own)
        while (place := self._tokens.take()) is not None:
            found += self._answered(new[place])
        return found

    def _answered(self, asked: Asked[Request]) -> list[Answered[Answer]]:
        found = []
        for place, request in asked:
            begin_s = time.perf_counter()
            answer = self._answer(request)
            found.append(Answered(place, answer, time.perf_counter() - begin_s))
        self._seconds += sum(each.seconds for each in found)
        return found

    def _received(self, fork: _Fork) -> list[Answered[Answer]]:
        """Return the answers of a fork; nothing where it died."""
        told = False
        try:
            while not fork.pipe.poll(_POLL_S):
                if not told and self.should_stop():
                    fork.pipe.send(None)
                    told = True
            found, error = fork.pipe.recv()
        except (EOFError, OSError):
            fork.is_dead = True
            return []
        if error is not None:
            raise error
        answered: list[Answered[Answer]] = found
        return answered

    def _inherit(self, legacy: Legacy[Any]) -> None:
        """Take over what the forks leave; a fork that died leaves nothing."""
        for fork in self._forks:
            with suppress(OSError):
                fork.pipe.send(_LEAVE)
        for fork in self._forks:
            with suppress(EOFError, OSError):
                legacy.take(fork.pipe.recv())

    def _bury(self) -> None:
        """Forget forks that died; their owners begin anew here."""
        for fork in [fork for fork in self._forks if fork.is_dead]:
            fork.end()
            self._forks.remove(fork)
            self._lane_of = {owner: None if lane is fork else lane for owner, lane in self._lane_of.items()}

    def _fork(self) -> None:
        """Make the other lanes; what was seen of owners before is known to all of them."""
        self._forks_after_s = float("inf")
        number = num_cores() if self._most is None else self._most
        for _ in range(number - 1 if sys.platform == "linux" else 0):
            ours, theirs = Pipe()
            process = start_fork()
            if process == 0:
                ours.close()
                self._serve(theirs)
            theirs.close()
            self._forks.append(_Fork(process, ours))

    def _serve(self, pipe: Connection) -> NoReturn:
        """Answer what comes through the pipe until it closes."""
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for fork in self._forks:
                fork.pipe.close()
            self._parent = pipe
            while True:
                asked = pipe.recv()
                if asked is None:  # a stop that came when all was done
                    continue
                if asked == _LEAVE:
                    pipe.send(self._legacy.left() if self._legacy is not None else None)
                    continue
                if isinstance(asked, _Give) and self._memory is not None:
                    pipe.send(self._memory.give_up(asked.owner))
                    continue
                if isinstance(asked, _Take) and self._memory is not None:
                    self._memory.take_over(asked.owner, asked.known)
                    continue
                pipe.send(self._told(*asked))
        except (EOFError, OSError):
            pass
        finally:
            os._exit(0)

    def _told(
        self, own: Asked[Request], new: Sequence[Asked[Request]]
    ) -> tuple[list[Answered[Answer]], Exception | None]:
        try:
            return self._worked(own, new), None
        except Exception as error:
            return [], error


class _Tokens:
    """Numbers that lanes take one by one, each number once, through a pipe: no lane that dies leaves a lock behind."""

    _BYTES = 4

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)

    def put(self, count: int) -> None:
        """Offer 0, .., count - 1, when all that was offered before is taken."""
        os.write(self._write, b"".join(place.to_bytes(self._BYTES, "little") for place in range(count)))

    def take(self) -> int | None:
        """Return a number that nobody has taken; None when there is none left."""
        try:
            return int.from_bytes(os.read(self._read, self._BYTES), "little")
        except BlockingIOError:
            return None

    def close(self) -> None:
        """End."""
        os.close(self._read)
        os.close(self._write)


@dataclass(eq=False)
class _Fork:
    """A fork of this process, and its pipe's end here."""

    process: int
    pipe: Connection
    is_dead: bool = False

    def ask(self, own: object, new: object) -> None:
        """Ask for answers; whether the fork still lives shows when they are received."""
        with suppress(OSError):
            self.pipe.send((own, new))

    def end(self) -> None:
        """End the fork, whatever it does: it holds nothing that anyone else needs."""
        self.pipe.close()
        end_fork(self.process)
