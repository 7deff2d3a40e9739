"""The joint search: the whole space bounded, the promising candidates solved in order of bound, the best one certified.

    1  price      every configuration, by class of layers; states and one microbatch must fit; bound any order
    2  cross      with schedules and chunks; bound by the family's closed form (`declared_space`)
    3  incumbent  complete and simulate the most promising candidates, improve the best (`first_incumbents`)
    4  close      with target X = incumbent / (1 + gap), in order of bound: caps, then cuts in a linear program without
                  and with memory; what is still open by branching on whole layers (`closing_pass`)

A candidate that is closed has no completion below X. The proved bound is the least of X (or the incumbent, at gap 0) and
the bounds of what was left open. Everything that is enumerated here is the declared space of the certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from stagewright.planner.lanes import Lanes, Memory
from stagewright.planner.search.closing_pass import ClosingPass
from stagewright.planner.search.completions import Completions
from stagewright.planner.search.cost_store import CostStore
from stagewright.planner.search.declared_space import DeclaredSpace
from stagewright.planner.search.exact_levels import with_exact_levels
from stagewright.planner.search.first_incumbents import FirstIncumbents
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.order_closing import OrderClosing, Outcome, Request
from stagewright.planner.search.order_store import ORDERS
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.starts import Starts
from stagewright.planner.search.work_count import WorkCount

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True, eq=False)
class JointSearch:
    """The parts of one search: its space, what candidates cost, what was found and the work it took."""

    limits: Limits
    space: DeclaredSpace
    costs: CostStore
    completions: Completions
    work: WorkCount
    _made: list[Lanes[Any, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, problem: Problem, limits: Limits) -> JointSearch:
        """Return the search of a problem, nothing done yet."""
        work = WorkCount()
        space = DeclaredSpace(problem, limits, work)
        costs = CostStore(space, work)
        return cls(limits, space, costs, Completions(space, costs, limits), work)

    def run(self) -> tuple[float, Termination]:
        """Search; return the proved bound and why the search ended."""
        bound_s, stopped = self._run() if self.space.num_candidates else (float("inf"), "gap")
        best = self.completions.best
        if best is not None:
            costs = self.costs.of(best.index)
            assert costs is not None
            self.completions.keep(best.index, with_exact_levels(costs, best.completion, self._is_late))
            bound_s = min(bound_s, self.completions.incumbent_s)
        if self.space.unpriced_s < bound_s:
            return self.space.unpriced_s, "time_limit"
        return bound_s, stopped

    def _is_late(self) -> bool:
        return self.limits.reached() is not None

    def _run(self) -> tuple[float, Termination]:
        """Search what was priced; nothing where no candidate can beat what other searches know."""
        if np.isfinite(self.completions.target_s) and self.space.bound_s.min() >= self.completions.target_s:
            self.work.count("bound", self.space.num_candidates)
            return self.completions.target_s, "gap"
        with self.lanes(Starts(self.costs).answer) as lanes:
            stopped = FirstIncumbents(self.space, self.costs, self.completions, lanes, self.limits, self.work).find()
        if stopped is not None:
            return float(min(self.space.bound_s.min(), self.completions.incumbent_s)), stopped
        return self._closed()

    def _closed(self) -> tuple[float, Termination]:
        """Close what the first incumbents left."""
        limits = replace(self.limits, should_stop=lambda: lanes.should_stop())
        closing = OrderClosing(self.space, self.costs, self.completions, limits)
        lanes: Lanes[Request, Outcome]
        with self.lanes(closing.answer, closing) as lanes:
            return ClosingPass(self.space, self.completions, lanes, self.limits, self.work).run()

    def lanes(self, answer: Callable[[Asked], Answer], memory: Memory[Any] | None = None) -> Lanes[Asked, Answer]:
        """Return lanes on all cores, or on one where other parts of a search have the others.

        Where the search was large enough for forks before, these are made at once.
        """
        most = None if self.limits.known is None else 1
        forks_after_s = 0.0 if any(lanes.have_forked for lanes in self._made) else None
        lanes = Lanes(answer, self._is_late, most=most, forks_after_s=forks_after_s, legacy=ORDERS, memory=memory)
        self._made.append(lanes)
        return lanes
