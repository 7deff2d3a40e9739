"""Closing candidates by request: all that is kept belongs to one order, so orders can be closed in different places at once.

An attempt goes from what is quick to what is dear: caps of the order's live vectors, multipliers of other candidates of the order,
linear programs (`closing`). The first attempt at an order tries to close all of its candidates together: what any of them costs at
least, in every second and byte, bounds them all. A branching goes on where an attempt left its candidate open (`branching`), and
a roaming looks for a better completion first.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, cast

from stagewright.planner.search.closing import Closed, Closer, Learned
from stagewright.planner.search.completions import Completions
from stagewright.planner.search.cost_store import CostStore
from stagewright.planner.search.declared_space import DeclaredSpace
from stagewright.planner.search.incumbent import improve
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.order import OrderKey
from stagewright.planner.search.order_reach import OrderReach, table_caps
from stagewright.planner.search.work_count import WorkCount

MOST_KEPT = 8  # programs of open candidates of an order: megabytes each


class Attempt(NamedTuple):
    """To close a candidate below a target; `alike` are all candidates of its order where none of them was tried yet."""

    candidate: int
    target_s: float
    incumbent_s: float
    alike: tuple[int, ...] = ()


class BranchOn(NamedTuple):
    """To go on with a candidate that linear programs left open with a bound, for so many nodes."""

    candidate: int
    bound_s: float
    target_s: float
    incumbent_s: float
    most_nodes: int


class Roam(NamedTuple):
    """To move a candidate's completion on, for so many moves or until its step is below `least_s`."""

    candidate: int
    bounds: tuple[int, ...]
    most_moves: int
    least_s: float


Request = Attempt | BranchOn | Roam


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a candidate, its program left out; which others were closed with it, and how; and the work it took."""

    closed: Closed
    work: WorkCount
    others: Mapping[int, str] = field(default_factory=dict)


@dataclass(eq=False)
class OrderClosing:
    """Answers requests about candidates; keeps what it learns of each order."""

    space: DeclaredSpace
    costs: CostStore
    completions: Completions
    limits: Limits
    work: WorkCount = field(default_factory=WorkCount)

    def __post_init__(self) -> None:
        self.costs = replace(self.costs, work=self.work)  # the same costs, counted here
        self.reach = OrderReach(self.space, self.costs)
        self.closer = Closer(self.limits)

    def answer(self, request: Request) -> Outcome:
        """Return the outcome of a request; a candidate stays open with no bound where the search is to end."""
        if self.limits.reached() is not None:
            return Outcome(Closed(-float("inf"), "open"), WorkCount())
        if isinstance(request, Attempt):
            others = self._closed_together(request)
            reason = others.pop(request.candidate, None)
            closed = self._attempted(request) if reason is None else Closed(request.target_s, reason)
            return Outcome(replace(closed, program=None), self._worked(), others)
        closed = self._branched(request) if isinstance(request, BranchOn) else self._roamed(request)
        return Outcome(closed, self._worked())

    def give_up(self, owner: Hashable) -> Learned | None:
        """Forget what was learned of an order, and return it."""
        return self.closer.learned.pop(cast(OrderKey, owner), None)

    def take_over(self, owner: Hashable, known: Learned | None) -> None:
        """Know of an order what another closing learned."""
        if known is not None:
            self.closer.learned[cast(OrderKey, owner)] = known

    def _worked(self) -> WorkCount:
        """Return the work since the last time."""
        done = replace(self.work)
        self.work.evaluated, self.work.simulated, self.work.pruned = 0, 0, {}
        return done

    def _closed_together(self, request: Attempt) -> dict[int, str]:
        """Return which candidates of an order its caps closed, one by one, or what any of them costs at least, all the others.

        The order itself is made only where its layout leaves several of them open.
        """
        target_s, alike = request.target_s, request.alike
        if len(alike) < 2:
            return {}
        self.reach.note_out_of_reach(alike, target_s)
        found = {other: "caps" for other in alike if other in self.reach.out_of_reach}
        left = [other for other in alike if other not in found]
        reason = self._least_closed(request, left) if len(left) > 1 else None
        return found if reason is None else found | dict.fromkeys(left, reason)

    def _least_closed(self, request: Attempt, alike: Sequence[int]) -> str | None:
        """Return how candidates of an order were closed by the least that any of them costs; None where they were not."""
        target_s, costs = request.target_s, self.costs.least_of(alike)
        if costs is None:
            return None
        count = self.space.key(request.candidate).num_microbatches
        reach, rank_layers = table_caps(costs.rank_tables, costs.order, count, target_s)
        if not reach:
            return "caps"
        closed = self.closer.close_by_known(costs, target_s, rank_layers)
        if closed is None:
            closed = self.closer.close_light(costs, target_s, rank_layers)
            self.work.simulated += closed.simulated
        return None if closed.reason == "open" else closed.reason

    def _attempted(self, request: Attempt) -> Closed:
        index, target_s = request.candidate, request.target_s
        reach, rank_layers = self.reach.order_caps(index, target_s)
        if not reach:
            return Closed(target_s, "caps")
        costs = self.costs.of(index)
        if costs is None:
            return Closed(target_s, "schedule")
        if self.space.rule(index).live == "one" and not self.reach.live_reach(index, costs, target_s):
            return Closed(target_s, "caps")
        self.work.evaluated += 1
        known = self.closer.close_by_known(costs, target_s, rank_layers)
        if known is not None:
            return known
        judge = partial(self.completions.judged, index)
        closed = self.closer.close(costs, target_s, request.incumbent_s, rank_layers, judge)
        self.work.simulated += closed.simulated
        kept = self.closer.of(costs.order).programs
        if closed.program is not None and len(kept) < MOST_KEPT:
            kept[index] = closed.program
        return closed

    def _branched(self, request: BranchOn) -> Closed:
        reach, rank_layers = self.reach.order_caps(request.candidate, request.target_s)
        if not reach:
            return Closed(request.target_s, "caps")
        costs = self.costs.of(request.candidate)
        assert costs is not None
        closed = self.closer.close_whole(
            costs,
            request.bound_s,
            request.target_s,
            request.incumbent_s,
            rank_layers,
            partial(self.completions.judged, request.candidate),
            request.most_nodes,
            request.candidate,
        )
        self.work.simulated += closed.simulated
        return closed

    def _roamed(self, request: Roam) -> Closed:
        costs = self.costs.of(request.candidate)
        assert costs is not None
        found, made = improve(costs, request.bounds, most_moves=request.most_moves, least_s=request.least_s)
        self.work.simulated += made
        return Closed(-float("inf"), "open", found)
