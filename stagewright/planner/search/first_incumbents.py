"""The first incumbents: the most promising candidates completed and simulated, the best of them improved.

Heuristic: what is found sets the target of the proofs that follow, nothing is proved here but bounds by caps. What is asked of a
candidate is a request (`starts`), answered a few at once on the cores there are; how many at once depends on no core.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from stagewright.planner.lanes import Lanes
from stagewright.planner.search.bounds import KINDS
from stagewright.planner.search.completions import Completions
from stagewright.planner.search.cost_store import CostStore
from stagewright.planner.search.declared_space import DeclaredSpace
from stagewright.planner.search.incumbent import MOST_STEPS, PROMISING, TRIES
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.order import OrderKey
from stagewright.planner.search.starts import Begin, Improve, Promise, Start, StartRequest
from stagewright.planner.search.work_count import WorkCount

Longs = npt.NDArray[np.int64]

NUM_REFINED = 240
_EVALUATED_S = 1e-8  # for each action of an order, of one evaluation by local search
LEAST_ANSWERED_S = 0.1
NUM_FIRST, NUM_LATE = 12, 48  # tries, and those that a deadline that has passed leaves where none was any good
ROOMY = 0.8  # of a device's room, that a guess may take
NUM_STARTS = 24
NUM_TRIED, NUM_ALIKE = 96, 2
NUM_IMPROVED = 12
# Candidates that are started at once, whatever the number of cores: the answer is the same.
AT_ONCE, PROMISED_AT_ONCE = 8, 16


@dataclass(frozen=True, eq=False)
class FirstIncumbents:
    """Starts a search with good completions."""

    space: DeclaredSpace
    costs: CostStore
    completions: Completions
    lanes: Lanes[StartRequest, Start]
    limits: Limits
    work: WorkCount

    def find(self) -> Termination | None:
        """Complete the most promising candidates: first where the caps are tight, then everywhere."""
        space, completions = self.space, self.completions
        if self.limits.deadline_s is not None:
            # An answer first: what comes behind may take all the time there is.
            every = np.arange(space.num_candidates)
            guessed = np.lexsort((space.estimate(every), space.filling() > ROOMY))
            stopped = self._begin(guessed[:NUM_LATE].tolist(), NUM_FIRST)
            if stopped is not None:
                return stopped
        bound_kinds = np.array([KINDS[rule.bound] for rule in space.problem.rules])[space.crossed[1]]
        tight = np.flatnonzero((bound_kinds == KINDS["uniform"]) | (bound_kinds == KINDS["gpipe"]))
        chosen = tight[np.argsort(space.bound_s[tight], kind="stable")][:NUM_REFINED]
        space.refine(chosen, 4.0 * float(space.bound_s.min()), 10)
        chosen = chosen[np.argsort(space.bound_s[chosen], kind="stable")]
        stopped = self._begin(chosen[:NUM_FIRST].tolist())
        if stopped is not None:
            return stopped
        high_s = completions.incumbent_s if completions.best is not None else 16.0 * float(space.bound_s.min())
        # The bound of a row that leads others is theirs; their own is raised only where that leaves them open.
        leading, followers, leaders = space.leaders(np.flatnonzero(space.bound_s < completions.target_s))
        space.refine(leading, high_s / (1.0 + self.limits.gap) if completions.best is not None else high_s, 0)
        space.bound_s[followers] = np.maximum(space.bound_s[followers], space.bound_s[leaders])
        left = np.flatnonzero(space.bound_s < completions.target_s)
        return self._begin(self._promising(left), NUM_STARTS)

    def _promising(self, chosen: Longs) -> list[int]:
        """Return candidates in order of what a start with few microbatches promises, then the others by estimate.

        Some of each pipeline depth and schedule are started; rows that another row undercuts and pairs of replicas are not.
        """
        leading = self.space.leaders(chosen)[0]
        leading = leading[np.argsort(self.space.estimate(leading), kind="stable")].tolist()
        found: list[tuple[float, int]] = []
        asked = self._alike_at_most(leading, NUM_ALIKE)
        while len(found) < NUM_TRIED and self.limits.reached() is None:
            some = list(islice(asked, min(PROMISED_AT_ONCE, NUM_TRIED - len(found))))
            if not some:
                break
            promised = self._answers([Promise(index) for index in some])
            found += [
                (start.step_s, index) for index, start in zip(some, promised, strict=True) if start.step_s < np.inf
            ]
        first = [index for _, index in sorted(found)]
        known = set(first)
        return first + [index for index in leading if index not in known]

    def _alike_at_most(self, indices: Sequence[int], most: int) -> Iterator[int]:
        """Yield the candidates of one replica, at most so many of each family, depth and chunks."""
        number: Counter[OrderKey] = Counter()
        for index in indices:
            key = self.space.key(index)._replace(num_microbatches=0)
            if number[key] < most and self.space.rule(index).num_replicas == 1:
                number[key] += 1
                yield index

    def _begin(self, chosen: Sequence[int], most: int | None = None) -> Termination | None:
        """Complete candidates until `most` were tried, and improve the best of them where they are promising.

        A deadline of LEAST_ANSWERED_S or more does not end the first tries, up to NUM_LATE, so that a late search has
        something to answer.
        """
        completions = self.completions
        in_haste = self.limits.deadline_s is not None and self.limits.deadline_s < LEAST_ANSWERED_S
        begun: list[tuple[float, int]] = []
        tried = 0
        left = deque(chosen)
        while left and (most is None or tried < most or completions.best is None):
            stopped = self.limits.reached()
            if stopped is not None and (
                in_haste or completions.best is not None or stopped == "cancelled" or tried >= NUM_LATE
            ):
                return stopped
            some: list[int] = []
            while left and len(some) < AT_ONCE:
                index = left.popleft()
                if self.space.bound_s[index] < completions.target_s:
                    some.append(index)
            starts = self._answers([Begin(index) for index in some])
            tried += sum(not start.is_refused for start in starts)
            begun += [
                (start.step_s, index) for index, start in zip(some, starts, strict=True) if start.completion is not None
            ]
        self.limits.report("incumbents", tried, tried, completions.known_s(), float(self.space.bound_s.min()))
        if self.limits.reached() is None:
            most_s = PROMISING * completions.incumbent_s
            self._answers(
                [self._improving(index) for begun_s, index in sorted(begun)[:NUM_IMPROVED] if begun_s <= most_s]
            )
        return self.limits.reached()

    def _answers(self, requests: Sequence[StartRequest]) -> list[Start]:
        """Return what became of candidates, and note it."""
        found = self.lanes.answers([(request.candidate, request) for request in requests])
        for request, start in zip(requests, found, strict=True):
            self.work.simulated += start.simulated
            if start.completion is not None:
                self.completions.keep(request.candidate, start.completion)
            if start.is_refused and not isinstance(request, Promise):
                self.work.count("schedule")
                self.space.bound_s[request.candidate] = np.inf
        return found

    def _improving(self, index: int) -> Improve:
        return Improve(index, self.completions.found[index].bounds, self._moves_in_time(index))

    def _moves_in_time(self, index: int) -> int:
        """Return how many steps local search may take on a candidate's order before the deadline, at least one."""
        if self.limits.deadline_s is None:
            return MOST_STEPS
        costs = self.costs.of(index)
        assert costs is not None
        each_s = TRIES * _EVALUATED_S * len(costs.order.before)
        return max(1, min(MOST_STEPS, int(self.limits.left_s() / each_s)))
