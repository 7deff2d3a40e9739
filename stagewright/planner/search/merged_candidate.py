"""What all candidates of a product of choice sets on one order cost at least, as something to close."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.choice_tables import ChoiceTables, halves, stage_tables
from stagewright.planner.search.order import Layout, Order
from stagewright.planner.search.problem import Partition, Problem
from stagewright.planner.search.space import FamilyRule
from stagewright.planner.search.stage_ranges import StageTables

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

_ROUNDING = 1e-9  # rows priced together may differ so much from those of the scorer


@dataclass(eq=False)
class MergedCandidate:
    """A set of choices for each pool, on one order; every bound of it holds for all of their products.

    Parameters
    ----------
    sets : of each pool; num_ranks : its pipeline ranks; rooms : bytes of one of its devices.
    layout : of the order, which is made when it is first asked for.
    """

    problem: Problem
    sets: tuple[ChoiceTables, ...]
    num_ranks: tuple[int, ...]
    rooms: tuple[float, ...]
    samples: int
    rule: FamilyRule
    layout: Layout
    make_order: Callable[[], Order]
    windows: Longs

    @cached_property
    def order(self) -> Order:
        return self.make_order()

    @property
    def is_one(self) -> bool:
        return False

    @property
    def whole(self) -> tuple[int, ...]:
        return self.problem.uncut

    @property
    def num_microbatches(self) -> int:
        return self.problem.job.global_batch // self.samples

    @cached_property
    def tables(self) -> StageTables:
        """The least of the sets by stage."""
        rooms = [room * (1 + _ROUNDING) for room in self.rooms]
        return stage_tables(self.sets, self.num_ranks, rooms, self.layout, self.problem.classes)

    @cached_property
    def hop_s(self) -> Floats:
        """Nothing: what messages take depends on the choices on both sides."""
        return np.zeros((len(self.layout.edges), self.problem.profile.num_layers + 1))

    def complete(self, cuts: Sequence[int]) -> Partition | None:
        """Return None: what no candidate costs can't be run."""
        return None

    def step_s(self, partition: Partition) -> float:
        """Return infinity, for the same reason."""
        return float("inf")

    def likely(self, cuts: tuple[int, ...]) -> list[int]:
        """Return which choice of each set looks best for the layers that a partition gives its pool."""
        found, first = [], 0
        for pool, (each, count) in enumerate(zip(self.sets, self.num_ranks, strict=True)):
            layers = self.problem.classes.of_layer[cuts[first] : cuts[first + count]]
            numbers = np.bincount(layers, minlength=len(self.problem.classes.first)).astype(np.float64)
            found.append(
                int(np.argmin(each.range_s(numbers, self.num_microbatches, count, self._live(pool), self.rooms[pool])))
            )
            first += count
        return found

    def cut_in_two(self) -> tuple[int, tuple[Longs, Longs]]:
        """Return the pool whose choices differ most, and two parts of its set."""
        numbers = self.problem.classes.counts
        spreads = [
            each.spread(numbers, self.num_microbatches, sum(self.num_ranks), self._live(pool), self.rooms[pool])
            for pool, each in enumerate(self.sets)
        ]
        widest = int(np.argmax([np.ptp(spread, axis=0).max() if len(spread) > 1 else -1.0 for spread in spreads]))
        return widest, halves(spreads[widest])

    def _live(self, pool: int) -> float:
        """Return the microbatches that live on a rank of a pool in the mean."""
        first = sum(self.num_ranks[:pool])
        return float(self.tables.live[first : first + self.num_ranks[pool]].mean())
