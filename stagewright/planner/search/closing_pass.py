"""The closing pass: every candidate with a bound below the target is closed, in order of bound, or left open with its bound.

With target X = incumbent / (1 + gap): caps, then cuts in a linear program without and with memory, then, for what is still open,
the least bound first, whole layers, levels and workspaces. Each of these is a request (`order_closing`), answered a few at once
on the cores there are (`lanes`). At most MOST_PROGRAMS candidates are tried; what is left then keeps its bound. A candidate that is
closed has no completion below X. The proved bound is the least of X and the bounds of what was left open.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagewright.planner.lanes import Lanes
from stagewright.planner.search.closing import MOST_NODES, Closed
from stagewright.planner.search.completions import Completions
from stagewright.planner.search.declared_space import DeclaredSpace
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.order import OrderKey
from stagewright.planner.search.order_closing import Attempt, BranchOn, Outcome, Request, Roam
from stagewright.planner.search.work_count import WorkCount

Longs = npt.NDArray[np.int64]

MOST_PROGRAMS = 20_000
MORE_NODES = 8  # times those of before, for what stays open
MOST_NODES_IN_ALL, MOST_EFFORT = 20_000, 2e11  # the effort is about a minute's on two cores
# Candidates that are tried, and branched, at once, whatever the number of cores: the answer is the same.
AT_ONCE, WHOLE_AT_ONCE = 32, 16
ROAMED = ((8, 100), (2, 400))  # candidates and moves tried of each


@dataclass(frozen=True, eq=False)
class ClosingPass:
    """Proves what the incumbent left to prove; better completions that turn up become the incumbent."""

    space: DeclaredSpace
    completions: Completions
    lanes: Lanes[Request, Outcome]
    limits: Limits
    work: WorkCount
    _heap: list[tuple[float, int]] = field(default_factory=list)  # candidates to try, by bound
    _alike: dict[OrderKey, list[int]] = field(default_factory=dict)  # candidates that were not tried together yet
    _waiting: dict[int, list[int]] = field(default_factory=dict)  # for the candidate that leads them
    _known: dict[int, str] = field(default_factory=dict)  # what was closed beside another candidate, and how
    _opened: dict[int, float] = field(default_factory=dict)
    _roamed: set[OrderKey] = field(default_factory=set)

    def run(self) -> tuple[float, Termination]:
        """Close candidates in order of bound until none is left below the target.

        A candidate whose row another one undercuts waits for the same family and chunks on that row: it is closed with it,
        or inherits the bound that it was left with.
        """
        num_left = self._begin()
        most_tried = self.work.evaluated + MOST_PROGRAMS
        done = 0
        while self._heap:
            if self._heap[0][0] >= self.completions.target_s:
                self.work.count("bound", num_left)
                break
            stopped = self.limits.reached()
            if stopped is not None or self.work.evaluated >= most_tried:
                self.work.count("left open", num_left)
                self.work.count("open", sum(left_s < self.completions.target_s for left_s in self._opened.values()))
                return min(
                    [self._heap[0][0], self.completions.incumbent_s, *self._opened.values()]
                ), stopped or "time_limit"
            for index, closed in self._tried(self._next()):
                num_left -= 1 + self._settled(index, closed)
                done += 1
                if done % 64 == 0:
                    self._report(done)
        return self._close_whole()

    def _begin(self) -> int:
        """Fill the heap; return how many candidates are in it or wait for one that is."""
        space = self.space
        left = np.flatnonzero(space.bound_s < self.completions.target_s)
        self.work.count("bound", space.num_candidates - len(left))
        leading, followers, leaders = space.leaders(left)
        for follower, leader in zip(followers.tolist(), leaders.tolist(), strict=True):
            self._waiting.setdefault(leader, []).append(follower)
        self._heap.extend(zip(space.bound_s[leading].tolist(), leading.tolist(), strict=True))
        heapq.heapify(self._heap)
        for _, index in self._heap:
            self._alike.setdefault(space.key(index), []).append(index)
        number = len(leading) + len(followers)
        self.work.count("dominated", len(left) - number)
        return number

    def _next(self) -> list[int]:
        """Take the candidates of least bound off the heap: AT_ONCE that have to be tried, and what is known before them.

        Behind the first of an order, which all of it is tried together with, its others have to wait.
        """
        chosen: list[int] = []
        begun: set[OrderKey] = set()
        number = 0
        while self._heap and number < AT_ONCE and self._heap[0][0] < self.completions.target_s:
            index = self._heap[0][1]
            key = self.space.key(index)
            if key in begun:
                break
            if index not in self._known:
                number += 1
                if key in self._alike:
                    begun.add(key)
            chosen.append(heapq.heappop(self._heap)[1])
        return chosen

    def _tried(self, chosen: Sequence[int]) -> list[tuple[int, Closed]]:
        """Return what became of some candidates, in their order."""
        target_s, incumbent_s = self.completions.target_s, self.completions.incumbent_s
        tried = [index for index in chosen if index not in self._known]
        alike = [tuple(self._alike.pop(self.space.key(index), ())) for index in tried]
        requests = [Attempt(index, target_s, incumbent_s, others) for index, others in zip(tried, alike, strict=True)]
        found = dict(zip(tried, self._answers(requests), strict=True))
        return [(index, found[index] if index in found else Closed(target_s, self._known[index])) for index in chosen]

    def _answers(self, requests: Sequence[Request]) -> list[Closed]:
        """Return what became of requests, and note all else that their outcomes say."""
        asked = [(self.space.key(request.candidate), request) for request in requests]
        closed = []
        for request, outcome in zip(requests, self.lanes.answers(asked), strict=True):
            self.work.add(outcome.work)
            self._known.update(outcome.others)
            if outcome.closed.completion is not None:
                self.completions.keep(request.candidate, outcome.closed.completion)
            closed.append(outcome.closed)
        return closed

    def _settled(self, index: int, closed: Closed) -> int:
        """Note a candidate's bound; return how many of those that waited for it are closed with it."""
        space, target_s = self.space, self.completions.target_s
        if closed.reason not in ("open", "schedule"):
            self.work.count(closed.reason)
        space.bound_s[index] = bound_s = max(float(space.bound_s[index]), closed.bound_s)
        behind = self._waiting.pop(index, [])
        if bound_s >= target_s:
            self.work.count("dominated", len(behind))
            return len(behind)
        self._opened[index] = bound_s
        space.refine(np.array(behind, dtype=np.int64), target_s, 0)
        for other in behind:
            heapq.heappush(self._heap, (float(max(space.bound_s[other], bound_s)), other))
        return 0

    def _report(self, done: int) -> None:
        least_s = min([self.completions.target_s, *(pair[0] for pair in self._heap[:1]), *self._opened.values()])
        self.limits.report("closing", done, done + len(self._heap), self.completions.known_s(), least_s)

    def _roam(self, left: Sequence[int]) -> None:
        """Look for better completions of what branching left open, longer where a short look found more.

        Branching on is dear, and each per mille here is a per mille off its target. One candidate stands for its order.
        """
        completions, opened = self.completions, self._opened
        orders: dict[OrderKey, int] = {}
        for index in sorted(left, key=opened.__getitem__):
            if index in completions.found and self.space.key(index) not in self._roamed:
                orders.setdefault(self.space.key(index), index)
        chosen = list(orders.values())[: ROAMED[0][0]]
        self._roamed.update(self.space.key(index) for index in chosen)
        for kept, moves in ROAMED:
            chosen = sorted(chosen, key=lambda index: completions.found[index].step_s)[:kept]
            chosen = [index for index in chosen if opened[index] < completions.target_s]
            target_s = completions.target_s
            self._answers([Roam(index, completions.found[index].bounds, moves, target_s) for index in chosen])

    def _close_whole(self) -> tuple[float, Termination]:
        """Close what linear programs left open by branching, in order of bound, because that is the proof.

        For one that stays open a better completion is looked for. When all had their turn, it is taken up where it ended, with
        MORE_NODES times the nodes, until all nodes or MOST_EFFORT are used: what closes soon may lower the target of the rest.
        """
        opened, completions = self._opened, self.completions
        left_nodes, effort = MOST_NODES_IN_ALL, 0.0
        granted = dict.fromkeys(opened, MOST_NODES)
        num_opened = len(opened)
        while left := [index for index in opened if opened[index] < completions.target_s]:
            stopped = self.limits.reached()
            if stopped is not None or left_nodes <= 0 or effort >= MOST_EFFORT:
                self.work.count("open", len(left))
                return min(opened.values()), stopped or "gap"
            chosen = sorted(left, key=lambda index: (granted[index], opened[index]))[:WHOLE_AT_ONCE]
            most = max(left_nodes // len(chosen), 1)
            target_s, incumbent_s = completions.target_s, completions.incumbent_s
            requests = [
                BranchOn(index, opened[index], target_s, incumbent_s, min(granted[index], most)) for index in chosen
            ]
            for index, closed in zip(chosen, self._answers(requests), strict=True):
                granted[index] *= MORE_NODES
                left_nodes -= closed.num_nodes
                effort += closed.effort
                opened[index] = max(opened[index], closed.bound_s)
                if opened[index] >= completions.target_s:
                    self.work.count("branching" if closed.reason == "open" else closed.reason)
                    del opened[index]
            least_s = min([completions.target_s, *opened.values()])
            self.limits.report("branching", num_opened - len(opened), num_opened, completions.known_s(), least_s)
            self._roam([index for index in chosen if index in opened])
        self.work.count("bound", len(opened))
        return completions.target_s, "gap"
