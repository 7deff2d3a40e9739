"""The completions that a search has found; the best one is its incumbent, which sets the target of all proofs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from stagewright.planner.search.cost_store import CostStore
from stagewright.planner.search.declared_space import DeclaredSpace
from stagewright.planner.search.incumbent import Completion
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Partition


@dataclass(frozen=True, eq=False)
class Solution:
    """A completed candidate by index."""

    index: int
    completion: Completion


@dataclass(eq=False)
class Completions:
    """The best completion found of each candidate, by index, and the best of all."""

    space: DeclaredSpace
    costs: CostStore
    limits: Limits
    best: Solution | None = None
    found: dict[int, Completion] = field(default_factory=dict)

    @property
    def incumbent_s(self) -> float:
        """Seconds of the best step found; infinite before the first."""
        return self.best.completion.step_s if self.best is not None else float("inf")

    @property
    def target_s(self) -> float:
        """A candidate that cannot get below this is closed."""
        known_s = float("inf") if self.limits.known is None else self.limits.known.least_s()
        return min(self.incumbent_s, known_s) / (1.0 + self.limits.gap)

    def known_s(self) -> float | None:
        """Return the best step found, in seconds; None before the first."""
        return None if self.best is None else self.incumbent_s

    def keep(self, index: int, completion: Completion) -> None:
        """Note a completion; it may be the new incumbent, and only then has to be judged."""
        if completion.step_s < self.incumbent_s:
            completion = self.judged(index, completion)
        known = self.found.get(index)
        if known is None or completion.step_s < known.step_s:
            self.found[index] = completion
        if completion.step_s < self.incumbent_s:
            self.best = Solution(index, completion)
            if self.limits.known is not None:
                self.limits.known.offer(completion.step_s)

    def judged(self, index: int, completion: Completion) -> Completion:
        """Return the completion with its step on links that messages wait for, where they may wait."""
        costs = self.costs.of(index)
        assert costs is not None
        if completion.judged or not costs.may_wait(completion.counts, completion.bounds):
            return completion
        partition = self.partition(index, completion)
        step_s = max(completion.step_s, self.space.problem.judged_step_s(self.space.candidate(index), partition))
        return replace(completion, step_s=step_s, judged=True)

    def partition(self, index: int, completion: Completion) -> Partition:
        """Return a completion as bounds and levels."""
        costs = self.costs.of(index)
        assert costs is not None
        return Partition(completion.bounds, costs.levels_of(completion.counts, completion.bounds))
