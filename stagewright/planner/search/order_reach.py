"""Whether the ranks of a candidate's order may hold all layers below a target: the caps of the order's own live vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.search.bounds import KINDS
from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.caps import RankTables, caps_reach, largest_class, order_caps
from stagewright.planner.search.class_prices import ClassPrices, prices_of
from stagewright.planner.search.cost_store import CostStore
from stagewright.planner.search.declared_space import DeclaredSpace
from stagewright.planner.search.order import Layout
from stagewright.planner.search.pricing import NUM_MICROBATCHES, PP
from stagewright.planner.search.rank_reach import reaches
from stagewright.planner.search.rank_slots import RankSlots

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


@dataclass(eq=False)
class OrderReach:
    """What the caps of candidates' orders show of a target, one by one or all of an order."""

    space: DeclaredSpace
    costs: CostStore
    out_of_reach: set[int] = field(default_factory=set)

    def order_caps(self, index: int, target_s: float) -> tuple[bool, tuple[Longs, Longs] | None]:
        """Tell whether the caps of the order's own live vectors reach the target, and each rank's range of layers."""
        if index in self.out_of_reach:
            return False, None
        outline = self._outline(index)
        if outline is not None and not self._layout_caps(index, outline, target_s)[0]:
            return False, None
        try:
            layout = self._layout(index)
        except (InvalidArgument, InvalidSchedule):
            return True, None
        return self._layout_caps(index, layout, target_s)

    def _layout_caps(self, index: int, layout: Layout, target_s: float) -> tuple[bool, tuple[Longs, Longs] | None]:
        space = self.space
        row = int(space.crossed[0][index])
        tables = self.costs.rank_tables(row, space.priced.latency_s[row : row + 1], layout)
        return table_caps(tables, layout, int(space.priced.shape[row, NUM_MICROBATCHES]), target_s)

    def note_out_of_reach(self, alike: Sequence[int], target_s: float) -> None:
        """Note which candidates of one order its caps close at the target, all at once."""
        try:
            layout = self._outline(alike[0]) or self._layout(alike[0])
        except (InvalidArgument, InvalidSchedule):
            return
        rows, priced = self.space.crossed[0][list(alike)], self.space.priced
        tables = self.costs.rank_tables(rows, priced.latency_s[rows], layout)
        reached = caps_reach(tables, priced.shape[rows, NUM_MICROBATCHES].astype(np.int64), target_s)
        self.out_of_reach.update(index for index, reach in zip(alike, reached.tolist(), strict=True) if not reach)

    def live_reach(self, index: int, costs: CandidateCosts, target_s: float) -> bool:
        """Tell whether caps reach the target where every rank holds what its slots hold at one time."""
        space = self.space
        row, rule = int(space.crossed[0][index]), space.rule(index)
        ranks, count = (int(size) for size in space.priced.shape[row, [PP, NUM_MICROBATCHES]])
        live, late = _least_live(costs.slots)
        prices: ClassPrices = prices_of(space.prices[costs.order.defers], row)
        return bool(
            reaches(
                target_s - space.problem.profile.step_overhead_s,
                KINDS[rule.bound],
                ranks,
                count,
                int(space.crossed[2][index]),
                np.zeros(max(ranks - 1, 0)),
                live,
                late,
                prices._replace(weight_grad_s=space.priced.weight_grad_of(row, costs.order)),
            )
        )

    def _outline(self, index: int) -> Layout | None:
        return self.space.problem.outline_of(self.space.key(index), self.space.rule(index))

    def _layout(self, index: int) -> Layout:
        return self.space.problem.layout_of(self.space.key(index), self.space.rule(index))


def table_caps(
    tables: RankTables, layout: Layout, num_microbatches: int, target_s: float
) -> tuple[bool, tuple[Longs, Longs] | None]:
    """Tell whether the caps of a layout's ranks reach the target, and each rank's range of layers of the largest class."""
    reach, caps = order_caps(tables, num_microbatches, target_s)
    if not reach:
        return False, None
    number = layout.num_replicas * largest_class(tables.run_class, tables.run_start[1:] - tables.run_start[:-1])[1]
    return True, (np.maximum(number - (caps.sum() - caps), 0), caps)


def _least_live(slots: RankSlots) -> tuple[Floats, Floats]:
    """Return the pair of multiplicities that every slot of a rank has at one time, the heaviest such pair, [D], [D]."""
    held = slots.stage[:, None, :] >= 0
    first, second = (np.where(held, slots.live[:, :, part], np.inf).min(axis=2) for part in (0, 1))
    best = np.argmax(first + second, axis=1)[:, None]
    live, late = (np.take_along_axis(values, best, axis=1)[:, 0] for values in (first, second))
    return np.maximum(live, 0.0), late
