"""The best orders of one placement, from which further improvement starts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from stagewright.planner.schedules.auto.instance import Ints

POOL_SIZE = 6


@dataclass
class Pool:
    """Up to `POOL_SIZE` different orders by makespan; of equal orders the first stays."""

    orders: list[tuple[float, Ints]] = field(default_factory=list)

    @property
    def best_s(self) -> float:
        """Least makespan, infinite when empty."""
        return self.orders[0][0] if self.orders else np.inf

    @property
    def best_words(self) -> Ints:
        """Order of the least makespan."""
        return self.orders[0][1]

    def add(self, makespan_s: float, words: Ints) -> None:
        """Take the order in, unless it deadlocks, is known, or is worse than a full pool."""
        if not np.isfinite(makespan_s) or any(np.array_equal(words, known) for _, known in self.orders):
            return
        at = sum(known_s <= makespan_s for known_s, _ in self.orders)
        self.orders.insert(at, (makespan_s, words.copy()))
        del self.orders[POOL_SIZE:]
