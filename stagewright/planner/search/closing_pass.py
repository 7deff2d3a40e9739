"""The closing pass: every candidate with a bound below the target is closed, in order of bound, or left open with its bound.

With target X = incumbent / (1 + gap): caps, then cuts in a linear program without and with memory (`closing`), then, for
what is still open, the least bound first, whole layers, levels and workspaces (`branching`). Candidates of one order are first
closed together: what any of them costs at least, in every second and byte, bounds them all. At most MOST_PROGRAMS
candidates go through linear programs; what is left then keeps its bound. A candidate that is closed has no completion
below X. The proved bound is the least of X and the bounds of what was left open.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stagewright.planner.cores import on_cores
from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.closing import MOST_NODES, Closed, Closer
from stagewright.planner.search.completions import Completions
from stagewright.planner.search.cost_store import CostStore
from stagewright.planner.search.cut_program import CutProgram
from stagewright.planner.search.declared_space import DeclaredSpace
from stagewright.planner.search.incumbent import Completion, improve
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.order import OrderKey
from stagewright.planner.search.order_reach import OrderReach, table_caps
from stagewright.planner.search.work_count import WorkCount

Longs = npt.NDArray[np.int64]

MOST_PROGRAMS = 20_000
MOST_NODES_IN_ALL, MOST_EFFORT = 3_000, 6e10  # the effort is about half a minute's
# Candidates that are closed, and branched, at once, whatever the number of cores: the answer is the same.
AT_ONCE, WHOLE_AT_ONCE = 4, 2
MOST_KEPT = 32  # programs of open candidates: megabytes each
ROAMED = ((8, 100), (2, 400))  # candidates and moves tried of each


class _Pending(NamedTuple):
    """A candidate (its index) that needs a program, with the layers of the largest class that its ranks may hold.

    Where it stands for several of its order, `together`, the costs are the least that any of them has.
    """

    at: int
    costs: CandidateCosts
    rank_layers: tuple[Longs, Longs] | None
    together: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ClosingPass:
    """Proves what the incumbent left to prove; better completions that turn up become the incumbent."""

    space: DeclaredSpace
    costs: CostStore
    completions: Completions
    reach: OrderReach
    closer: Closer
    limits: Limits
    work: WorkCount
    _alike: dict[OrderKey, list[int]] = field(default_factory=dict)  # candidates that were not tried together yet
    _programs: dict[int, CutProgram] = field(
        default_factory=dict
    )  # of candidates that are open, which branching goes on with
    _together: dict[int, str] = field(default_factory=dict)  # those that were closed together, and how

    def run(self) -> tuple[float, Termination]:
        """Close candidates in order of bound until none is left below the target.

        A candidate whose row another one undercuts waits for the same family and chunks on that row: it is closed with it,
        or inherits the bound that it was left with.
        """
        space, completions = self.space, self.completions
        left = np.flatnonzero(space.bound_s < completions.target_s)
        self.work.count("bound", space.num_candidates - len(left))
        leading, followers, leaders = space.leaders(left)
        waiting: dict[int, list[int]] = {}
        for follower, leader in zip(followers.tolist(), leaders.tolist(), strict=True):
            waiting.setdefault(leader, []).append(follower)
        opened: dict[int, float] = {}
        heap = list(zip(space.bound_s[leading].tolist(), leading.tolist(), strict=True))
        heapq.heapify(heap)
        for _, index in heap:
            self._alike.setdefault(space.key(index), []).append(index)
        num_left = len(leading) + len(followers)
        self.work.count("dominated", len(left) - num_left)
        done = num_programs = 0
        pending: dict[OrderKey, _Pending] = {}
        closed: list[tuple[int, float | None]]
        while heap or pending:
            if (
                not heap
                or len(pending) == AT_ONCE
                or heap[0][0] >= completions.target_s
                or space.key(heap[0][1]) in pending
            ):
                if not pending:
                    self.work.count("bound", num_left)
                    break
                closed = self._close_pending(list(pending.values()))
                num_programs += len(pending)
                pending.clear()
            else:
                bound_s, index = heapq.heappop(heap)
                stopped = self.limits.reached()
                if stopped is not None or num_programs >= MOST_PROGRAMS:
                    self.work.count("left open", num_left)
                    self.work.count("open", sum(left_s < completions.target_s for left_s in opened.values()))
                    return min([bound_s, completions.incumbent_s, *opened.values()]), stopped or "time_limit"
                found = self._close_at_once(index)
                if isinstance(found, _Pending):
                    pending[space.key(index)] = found
                    continue
                closed = [(index, found)]
            for index, bound_s in closed:
                if bound_s is None:
                    heapq.heappush(heap, (float(space.bound_s[index]), index))
                    continue
                done += 1
                num_left -= 1
                space.bound_s[index] = max(space.bound_s[index], bound_s)
                behind = waiting.pop(index, [])
                if bound_s < completions.target_s:
                    opened[index] = bound_s
                    space.refine(np.array(behind, dtype=np.int64), completions.target_s, 0)
                    for other in behind:
                        heapq.heappush(heap, (float(max(space.bound_s[other], bound_s)), other))
                else:
                    self.work.count("dominated", len(behind))
                    num_left -= len(behind)
                if done % 64 == 0:
                    least = min([completions.target_s, *(pair[0] for pair in heap[:1]), *opened.values()])
                    self.limits.report("closing", done, done + len(heap), completions.known_s(), least)
        self._roam(opened)
        return self._close_whole(opened)

    def _roam(self, opened: dict[int, float]) -> None:
        """Look for better completions of what linear programs left open, longer where a short look found more.

        Branching is dear, and each per mille here is a per mille off its target. One candidate stands for its order.
        """
        completions = self.completions
        orders: dict[OrderKey, int] = {}
        for index in sorted(opened, key=opened.__getitem__):
            if index in completions.found and opened[index] < completions.target_s:
                orders.setdefault(self.space.key(index), index)
        left = list(orders.values())[: ROAMED[0][0]]
        for kept, moves in ROAMED:
            left = sorted(left, key=lambda index: completions.found[index].step_s)[:kept]
            chosen = [index for index in left if opened[index] < completions.target_s and self.limits.reached() is None]
            moved = on_cores(
                partial(self._moved_on, moves, completions.target_s), [(i, self.costs.of(i)) for i in chosen]
            )
            for index, (better, made) in zip(chosen, moved, strict=True):
                self.work.simulated += made
                if better is not None:
                    completions.keep(index, better)

    def _moved_on(
        self, moves: int, least_s: float, item: tuple[int, CandidateCosts | None]
    ) -> tuple[Completion | None, int]:
        index, costs = item
        if costs is None or self.limits.reached() is not None:
            return None, 0
        return improve(costs, self.completions.found[index].bounds, most_moves=moves, least_s=least_s)

    def _close_whole(self, opened: dict[int, float]) -> tuple[float, Termination]:
        """Close what linear programs left open by branching, always the one of least bound, because that is the proof.

        One that stays open is taken up again with twice the nodes, until all nodes or MOST_EFFORT are used.
        """
        space, completions = self.space, self.completions
        heap = [(bound_s, index) for index, bound_s in opened.items()]
        heapq.heapify(heap)
        left_nodes, effort = MOST_NODES_IN_ALL, 0.0
        granted: dict[int, int] = {}
        while heap and heap[0][0] < completions.target_s and left_nodes > 0 and effort < MOST_EFFORT:
            stopped = self.limits.reached()
            if stopped is not None:
                self.work.count("open", len(heap))
                return heap[0][0], stopped
            chosen: dict[OrderKey, tuple[float, int]] = {}
            while heap and len(chosen) < WHOLE_AT_ONCE and space.key(heap[0][1]) not in chosen:
                if heap[0][0] >= completions.target_s:
                    break
                pair = heapq.heappop(heap)
                chosen[space.key(pair[1])] = pair
            pairs = [(index, bound_s) for bound_s, index in chosen.values()]
            most = max(left_nodes // len(pairs), 1)
            nodes = [min(granted.get(index, MOST_NODES), most) for index, _ in pairs]
            for (index, bound_s), closed in zip(pairs, self._branched(pairs, nodes), strict=True):
                granted[index] = 2 * granted.get(index, MOST_NODES)
                left_nodes -= closed.num_nodes
                effort += closed.effort
                self.work.simulated += closed.simulated
                if closed.completion is not None:
                    completions.keep(index, closed.completion)
                raised_s = max(bound_s, closed.bound_s)
                if raised_s < completions.target_s:
                    heapq.heappush(heap, (raised_s, index))
                else:
                    self.work.count("branching" if closed.reason == "open" else closed.reason)
        self.work.count("open", sum(bound_s < completions.target_s for bound_s, _ in heap))
        return min([completions.target_s, *(bound_s for bound_s, _ in heap)]), "gap"

    def _branched(self, pairs: Sequence[tuple[int, float]], most_nodes: Sequence[int]) -> list[Closed]:
        """Return what branching with so many nodes each proves of some candidates of different orders with their bounds."""
        target_s, incumbent_s = self.completions.target_s, self.completions.incumbent_s
        caps = [self.reach.order_caps(index, target_s) for index, _ in pairs]

        def branched(place: int) -> Closed:
            (index, bound_s), (reach, rank_layers) = pairs[place], caps[place]
            if not reach:
                return Closed(target_s, "caps")
            costs = self.costs.of(index)
            assert costs is not None
            judge = partial(self.completions.judged, index)
            program = self._programs.pop(index, None)
            return self.closer.close_whole(
                costs, bound_s, target_s, incumbent_s, rank_layers, judge, most_nodes[place], program
            )

        return on_cores(branched, range(len(pairs)))

    def _close_at_once(self, index: int) -> float | _Pending:
        """Return the target as a bound of the candidate where that is quickly proved, else what a program needs."""
        target_s = self.completions.target_s
        together = self._closed_together(index)
        if together is not None:
            return together
        reach, rank_layers = self.reach.order_caps(index, target_s)
        if not reach:
            self.work.count("caps")
            return target_s
        costs = self.costs.of(index)
        if costs is None:
            return target_s
        if self.space.rule(index).live == "one" and not self.reach.live_reach(index, costs, target_s):
            self.work.count("caps")
            return target_s
        self.work.evaluated += 1
        known = self.closer.close_by_known(costs, target_s, rank_layers)
        if known is None:
            return _Pending(index, costs, rank_layers)
        self.work.count(known.reason)
        return known.bound_s

    def _closed_together(self, index: int) -> float | _Pending | None:
        """Return the target where the candidates of an order were closed together, or what a program for all of them needs.

        The order itself is made only where its layout leaves some of them open. None where a candidate has to be closed by itself.
        """
        target_s = self.completions.target_s
        alike = self._alike.pop(self.space.key(index), [])
        if len(alike) > 1:
            self.reach.note_out_of_reach(alike, target_s)
            alike = [other for other in alike if other not in self.reach.out_of_reach]
        if len(alike) > 1:
            costs = self.costs.least_of(alike)
            if costs is None:
                return None
            count = self.space.key(index).num_microbatches
            reach, rank_layers = table_caps(costs.rank_tables, costs.order, count, target_s)
            known = self.closer.close_by_known(costs, target_s, rank_layers) if reach else Closed(target_s, "caps")
            if known is None:
                return _Pending(index, costs, rank_layers, tuple(alike))
            self._together.update(dict.fromkeys(alike, known.reason))
        if index not in self._together:
            return None
        self.work.count(self._together[index])
        return target_s

    def _close_pending(self, pending: Sequence[_Pending]) -> list[tuple[int, float | None]]:
        """Return a bound of each of some candidates of different orders: at least the target, or the best that was proved.

        None where it stood for several that are not closed together.
        """
        target_s, incumbent_s = self.completions.target_s, self.completions.incumbent_s

        def closed_of(one: _Pending) -> Closed:
            if one.together:
                return self.closer.close_light(one.costs, target_s, one.rank_layers)
            judge = partial(self.completions.judged, one.at)
            return self.closer.close(one.costs, target_s, incumbent_s, one.rank_layers, judge)

        found = on_cores(closed_of, pending)
        bounds: list[tuple[int, float | None]] = []
        for one, closed in zip(pending, found, strict=True):
            self.work.simulated += closed.simulated
            if one.together:
                if closed.reason != "open":
                    self._together.update(dict.fromkeys(one.together, closed.reason))
                bounds.append((one.at, None))
                continue
            if closed.reason != "open":
                self.work.count(closed.reason)
            if closed.completion is not None:
                self.completions.keep(one.at, closed.completion)
            if closed.program is not None and len(self._programs) < MOST_KEPT:
                self._programs[one.at] = closed.program
            bounds.append((one.at, closed.bound_s))
        return bounds
