"""The work of a search while it runs: what was solved, what was simulated, and why candidates left."""

from __future__ import annotations

from dataclasses import dataclass, field

from stagewright.planner.search.certified import Work


@dataclass(eq=False)
class WorkCount:
    """Candidates solved, completions simulated, and candidates (or configurations) that left by each reason."""

    evaluated: int = 0
    simulated: int = 0
    pruned: dict[str, int] = field(default_factory=dict)

    def count(self, reason: str, number: int = 1) -> None:
        """Count candidates (or configurations) that left for a reason."""
        if number:
            self.pruned[reason] = self.pruned.get(reason, 0) + number

    def add(self, other: WorkCount) -> None:
        """Add the work that another counted."""
        self.evaluated += other.evaluated
        self.simulated += other.simulated
        for reason, number in other.pruned.items():
            self.count(reason, number)

    def total(self, num_candidates: int) -> Work:
        """Return the work so far of a search of so many candidates."""
        return Work(num_candidates, self.evaluated, self.simulated, self.pruned)
