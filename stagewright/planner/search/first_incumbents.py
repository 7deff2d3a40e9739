"""The first incumbents: the most promising candidates completed and simulated, the best of them improved.

Heuristic: what is found sets the target of the proofs that follow, nothing is proved here but bounds by caps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.bounds import KINDS
from stagewright.planner.search.completions import Completions
from stagewright.planner.search.cost_store import CostStore
from stagewright.planner.search.declared_space import DeclaredSpace
from stagewright.planner.search.incumbent import MOST_STEPS, PROMISING, TRIES, improve, start
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.order import Order, OrderKey
from stagewright.planner.search.work_count import WorkCount

Longs = npt.NDArray[np.int64]

NUM_REFINED = 240
_EVALUATED_S = 1e-8  # for each action of an order, of one evaluation by local search
LEAST_ANSWERED_S = 0.1
NUM_FIRST = 12
NUM_STARTS = 24
NUM_TRIED, NUM_ALIKE = 96, 2
NUM_IMPROVED = 12


@dataclass(frozen=True, eq=False)
class FirstIncumbents:
    """Starts a search with good completions."""

    space: DeclaredSpace
    costs: CostStore
    completions: Completions
    limits: Limits
    work: WorkCount

    def find(self) -> Termination | None:
        """Complete the most promising candidates: first where the caps are tight, then everywhere."""
        space, completions = self.space, self.completions
        if self.limits.deadline_s is not None:
            # An answer first: what comes behind may take all the time there is.
            guessed = np.argsort(space.estimate(np.arange(space.num_candidates)), kind="stable")
            stopped = self._begin(guessed[:NUM_FIRST].tolist())
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
        tried: dict[OrderKey, int] = {}
        found: list[tuple[float, int]] = []
        for index in leading:
            key = self.space.key(index)._replace(num_microbatches=0)
            if len(found) >= NUM_TRIED or self.limits.reached() is not None:
                break
            if tried.get(key, 0) >= NUM_ALIKE or self.space.rule(index).num_replicas > 1:
                continue
            tried[key] = tried.get(key, 0) + 1
            promised_s = self._promise(index)
            if promised_s is not None:
                found.append((promised_s, index))
        first = [index for _, index in sorted(found)]
        known = set(first)
        return first + [index for index in leading if index not in known]

    def _promise(self, index: int) -> float | None:
        """Return the step of a start with few microbatches, the rest at the pace of its fullest rank; None without one."""
        short = self.costs.short_of(index)
        if short is None:
            return None
        costs, left = short
        self.work.simulated += 1
        completion = start(costs)
        if completion is None:
            return None
        if left == 0:
            self.completions.keep(index, completion)
        on_stage = costs.stage_costs(completion.counts).sum(axis=0)
        on_rank = np.where(costs.slots.stage >= 0, on_stage[costs.slots.stage], 0.0).sum(axis=1)
        return completion.step_s + left / costs.order.num_replicas * float(on_rank.max())

    def _begin(self, chosen: Sequence[int], most: int | None = None) -> Termination | None:
        """Complete candidates until `most` were tried, and improve the best of them where they are promising.

        A deadline of LEAST_ANSWERED_S or more does not end the first few tries, so that a late search has something to
        answer.
        """
        completions = self.completions
        in_haste = self.limits.deadline_s is not None and self.limits.deadline_s < LEAST_ANSWERED_S
        begun: list[tuple[float, int]] = []
        tried = 0
        for index in chosen:
            if most is not None and tried >= most and completions.best is not None:
                break
            if self.space.bound_s[index] >= completions.target_s:
                continue
            stopped = self.limits.reached() if tried % 8 == 0 else None
            if stopped is not None and (
                in_haste or completions.best is not None or stopped == "cancelled" or tried >= NUM_FIRST
            ):
                return stopped
            costs = self.costs.of(index)
            if costs is None:
                continue
            tried += 1
            self.work.simulated += 1
            completion = start(costs)
            if completion is not None:
                completions.keep(index, completion)
                begun.append((completion.step_s, index))
        self.limits.report("incumbents", tried, tried, completions.known_s(), float(self.space.bound_s.min()))
        for begun_s, index in sorted(begun)[:NUM_IMPROVED]:
            if begun_s > PROMISING * completions.incumbent_s or self.limits.reached() is not None:
                break
            costs = self.costs.of(index)
            assert costs is not None
            steps = self._moves_in_time(costs.order)
            better, made = improve(costs, completions.found[index].bounds, most_steps=steps)
            self.work.simulated += made
            if better is not None:
                completions.keep(index, better)
        return self.limits.reached()

    def _moves_in_time(self, order: Order) -> int:
        """Return how many steps local search may take on an order before the deadline, at least one."""
        if self.limits.deadline_s is None:
            return MOST_STEPS
        each_s = TRIES * _EVALUATED_S * len(order.before)
        return max(1, min(MOST_STEPS, int(self.limits.left_s() / each_s)))
