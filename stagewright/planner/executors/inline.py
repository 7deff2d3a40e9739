"""Parts one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.executors.part import Part, search_part


@dataclass
class LeastStep:
    """The least step found so far, in one process."""

    step_s: float = float("inf")

    def least_s(self) -> float:
        return self.step_s

    def offer(self, step_s: float) -> None:
        self.step_s = min(self.step_s, step_s)


class InlineExecutor:
    """Runs parts in order."""

    def run(self, parts: Sequence[Part], should_stop: Callable[[], bool]) -> Iterator[tuple[int, PlanOutcome]]:
        """Yield the outcome of each part in order."""
        known = LeastStep()
        for place, part in enumerate(parts):
            yield place, search_part(part, known, should_stop)
