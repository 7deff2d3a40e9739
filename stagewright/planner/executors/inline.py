"""Parts one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.executors.part import Part, search_part
from stagewright.planner.search.limits import LeastStep


class InlineExecutor:
    """Runs parts in order."""

    def run(self, parts: Sequence[Part], should_stop: Callable[[], bool]) -> Iterator[tuple[int, PlanOutcome]]:
        """Yield the outcome of each part in order."""
        known = LeastStep()
        for place, part in enumerate(parts):
            yield place, search_part(part, known, should_stop)
