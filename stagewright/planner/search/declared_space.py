"""The declared space of a search: every configuration crossed with schedules and chunks, each candidate with its bound.

Configurations are priced by class of layers; states and one microbatch must fit. A candidate's bound begins with what its
family's closed form shows, and rises as searches work on it: by caps here (`refinement`), by programs later.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.least_work import least_step_s
from stagewright.planner.search.bounds import KINDS, family_bounds, memory_possible, work_bounds
from stagewright.planner.search.class_prices import ClassPrices, class_prices
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.order import OrderKey
from stagewright.planner.search.pricing import NUM_MICROBATCHES, PP, Priced, configuration_of, unique_rows
from stagewright.planner.search.problem import Candidate, Problem
from stagewright.planner.search.refinement import LIVE, Outlines, refined, taken
from stagewright.planner.search.row_leaders import RowLeaders
from stagewright.planner.search.space import PIPELINE_OUTSIDE, FamilyRule, schedule_sizes
from stagewright.planner.search.work_count import WorkCount

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

_CHUNK = 64  # candidates refined between two looks at the clock
_PRICING = 0.3  # share of a deadline that pricing may take
# Idle time of a family over that of 1F1B.
_IDLE = {
    "zb-h1": 0.4,
    "zb-h2": 0.1,
    "zb-v": 0.1,
    "v-half": 1.0,
    "dualpipe-v": 0.4,
    "dualpipe": 0.4,
    "interleaved-zb": 0.3,
}


@dataclass(eq=False)
class DeclaredSpace:
    """The candidates of a problem by index, with what is known of each before it is solved.

    Parameters
    ----------
    work : where candidates and configurations are counted that leave.
    """

    problem: Problem
    limits: Limits
    work: WorkCount

    @cached_property
    def levels(self) -> npt.NDArray[np.bool_]:
        """Which recomputation levels are allowed, [3]."""
        allowed = np.zeros(3, dtype=np.bool_)
        allowed[list(self.problem.levels)] = True
        return allowed

    @cached_property
    def room_bytes(self) -> float:
        """Bytes of a device for what depends on the plan."""
        return self.problem.capacity_bytes - self.problem.base_bytes

    @cached_property
    def _shapes(self) -> tuple[Ints, int]:
        """The configurations to search, and how many a short deadline left unpriced."""
        shapes = self.problem.shapes
        if self.limits.deadline_s is None:
            return shapes, 0
        kept_s = (1.0 - _PRICING) * self.limits.deadline_s
        known = self.problem.price_list.priced_in_time(shapes, lambda: self.limits.left_s() < kept_s)
        return shapes[known], int((~known).sum())

    @cached_property
    def unpriced_s(self) -> float:
        """Bound of what a short deadline left unpriced: all work at the engines' peaks; infinite when nothing was."""
        unpriced = self._shapes[1]
        self.work.count("not priced", unpriced)
        if not unpriced:
            return float("inf")
        return least_step_s(self.problem.model(PIPELINE_OUTSIDE), max(self.problem.device_counts))

    @cached_property
    def priced(self) -> Priced:
        """Configurations that might fit."""
        unpriced = self._shapes[1]
        priced = self.problem.priced if not unpriced else self.problem.price_list.price(self._shapes[0])
        possible = memory_possible(priced, self.problem.classes, self.room_bytes, self.levels)
        self.work.count("memory", int((~possible).sum()))
        return priced.take(np.flatnonzero(possible))

    @cached_property
    def prices(self) -> tuple[ClassPrices, ClassPrices]:
        """What the bounds see of all configurations: where backwards are whole, and where all of them are split."""
        whole, split = (
            class_prices(
                self.priced,
                self.problem.classes,
                defers=defers,
                overhead_s=self.problem.profile.action_overhead_s,
                levels=self.levels,
                capacity_bytes=self.room_bytes * (1 + 1e-9),
            )
            for defers in (False, True)
        )
        return whole, split

    @cached_property
    def _row_leaders(self) -> RowLeaders:
        return RowLeaders(self.problem, self.priced)

    @cached_property
    def largest_cut_bytes(self) -> Floats:
        """Bytes of the largest tensor that may cross a cut, of each configuration."""
        return np.asarray(self.priced.cut_bytes.max(axis=1))

    @cached_property
    def work_s(self) -> Floats:
        profile = self.problem.profile
        return work_bounds(self.priced, self.problem.classes, profile.action_overhead_s, profile.step_overhead_s)

    @property
    def crossed(self) -> tuple[Longs, Longs, Longs]:
        """Row, rule and chunks of each candidate."""
        return self._crossed[:3]

    @cached_property
    def _crossed(self) -> tuple[Longs, Longs, Longs, Longs, list[OrderKey]]:
        """Row, rule, chunks and order of each candidate, and the keys of the orders."""
        shape = self.priced.shape
        pairs, where = unique_rows(shape[:, [PP, NUM_MICROBATCHES]])
        rules = self.problem.rules
        place = {rule.name: number for number, rule in enumerate(rules)}
        sizes = [
            [
                (place[rule.name], chunks)
                for rule, chunks in schedule_sizes(
                    rules, self.problem.job.space, ranks, count, self.problem.profile.num_layers
                )
            ]
            for ranks, count in pairs.tolist()
        ]
        repeats = np.array([len(size) for size in sizes], dtype=np.int64)
        rows = np.repeat(np.arange(len(shape)), repeats[where])
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(repeats)))
        within = np.arange(len(rows)) - np.repeat(np.cumsum(repeats[where]) - repeats[where], repeats[where])
        table = np.array([pair for size in sizes for pair in size], dtype=np.int64).reshape(-1, 2)
        order = starts[where[rows]] + within
        chosen = table[order]
        keys = [
            OrderKey(rules[rule].name, ranks, count, chunks)
            for (ranks, count), size in zip(pairs.tolist(), sizes, strict=True)
            for rule, chunks in size
        ]
        return rows, chosen[:, 0], chosen[:, 1], order, keys

    @cached_property
    def bound_s(self) -> Floats:
        """Bound of each candidate; raised as candidates are worked on."""
        rows, rules, _ = self.crossed
        kinds = np.array([KINDS[rule.bound] for rule in self.problem.rules], dtype=np.int64)[rules]
        profile = self.problem.profile
        return family_bounds(
            self.priced,
            self.problem.classes,
            rows,
            kinds,
            work_s=self.work_s,
            overhead_s=profile.action_overhead_s,
            step_overhead_s=profile.step_overhead_s,
        )

    @property
    def num_candidates(self) -> int:
        return len(self.crossed[0])

    def rule(self, index: int) -> FamilyRule:
        """Return a candidate's family."""
        return self.problem.rules[int(self.crossed[1][index])]

    def candidate(self, index: int) -> Candidate:
        """Return a candidate as a record."""
        row = self.priced.shape[int(self.crossed[0][index])]
        return Candidate(configuration_of(row), self.rule(index), int(self.crossed[2][index]))

    def key(self, index: int) -> OrderKey:
        """Return the key of a candidate's order."""
        return self._crossed[4][int(self._crossed[3][index])]

    def leaders(self, chosen: Longs) -> tuple[Longs, Longs, Longs]:
        """Return which of some candidates lead, which follow, and whom: the equal schedule on the row that leads theirs.

        A follower's every completion takes at least as long as the same completion of its leader while links never wait,
        so a bound of the one is a bound of the other. A leader that is not among the chosen has a bound of at least the
        target; then so has the follower, which is in neither result.
        """
        if not len(chosen):
            return chosen, chosen, chosen
        rows, rules, chunks = (column[chosen] for column in self.crossed)
        different, of_row = np.unique(rows, return_inverse=True)
        leading_rows = self._row_leaders.of(different)[of_row]
        leads = leading_rows == rows
        led = np.flatnonzero(~leads)
        # Where the leading row meets the same schedule among the chosen, if it does.
        schedules = (rules * 1024 + chunks) << 32
        key, wanted = schedules + rows, (schedules + leading_rows)[led]
        by_key = np.argsort(key)
        place = by_key[np.minimum(np.searchsorted(key, wanted, sorter=by_key), len(key) - 1)]
        meets = key[place] == wanted
        return chosen[leads], chosen[led[meets]], chosen[place[meets]]

    def refine(self, chosen: Longs, high_s: float, steps: int) -> None:
        """Raise the bounds of some candidates to what their caps show, until a limit is reached.

        Where `high_s` is out of reach, that is the bound.
        """
        if self.limits.deadline_s is None:
            self._refine_some(chosen, high_s, steps)
            return
        size = _CHUNK * 16 >> min(steps, 4)
        for first in range(0, len(chosen), size):
            if self.limits.reached() is not None:
                return
            self._refine_some(chosen[first : first + size], high_s, steps)

    def _refine_some(self, chosen: Longs, high_s: float, steps: int) -> None:
        if not len(chosen):
            return
        rows, rules, chunks = (column[chosen] for column in self.crossed)
        of = self.problem.rules
        outlines = Outlines(
            rows,
            np.array([KINDS[rule.bound] for rule in of], dtype=np.int64)[rules],
            np.array([LIVE[rule.live] for rule in of], dtype=np.int64)[rules],
            chunks,
            np.array([rule.num_replicas for rule in of], dtype=np.int64)[rules],
            np.array([rule.split for rule in of], dtype=np.bool_)[rules],
        )
        # Families that obey the same rules share a bound.
        group = rows
        for values in outlines[1:]:
            group = group * 64 + values
        _, first, where = np.unique(group, return_index=True, return_inverse=True)
        where = np.ravel(where)
        low_s = np.full(len(first), np.inf)
        np.minimum.at(low_s, where, self.bound_s[chosen])
        extra_s = self.problem.profile.step_overhead_s
        raised = np.empty(len(first))
        outlines = taken(outlines, first)
        for defers in (False, True):
            own = np.flatnonzero(outlines.splits == defers)
            raised[own] = refined(
                low_s[own] - extra_s,
                high_s - extra_s,
                steps,
                taken(outlines, own),
                self.priced.shape,
                self.prices[defers],
            )
        raised = raised[where]
        self.bound_s[chosen] = np.where(
            np.isfinite(raised),
            np.maximum(self.bound_s[chosen], raised + extra_s),
            np.maximum(self.bound_s[chosen], high_s),
        )

    def estimate(self, chosen: Longs) -> Floats:
        """Return a guess of each candidate's step: the bound, and the idle time its family leaves."""
        rows, rules, chunks = (column[chosen] for column in self.crossed)
        shape = self.priced.shape[rows]
        share = np.array([_IDLE.get(rule.name, 1.0) for rule in self.problem.rules])[rules]
        idle = share * (shape[:, PP] - 1.0) / (chunks * np.maximum(shape[:, NUM_MICROBATCHES], 1.0))
        return np.asarray(np.maximum(self.bound_s[chosen], self.work_s[rows] * (1.0 + idle)))

    def filling(self) -> Floats:
        """Return a guess of which share of a device's room each candidate takes at the strongest recomputation that is allowed."""
        rows, rules, _ = self.crossed
        priced, number = self.priced, self.problem.classes.counts.astype(np.float64)
        ranks, count = (priced.shape[rows, column].astype(np.float64) for column in (PP, NUM_MICROBATCHES))
        kept = priced.kept_bytes[:, int(np.flatnonzero(self.levels)[-1])] @ number
        holds_all = np.array([rule.live == "all" for rule in self.problem.rules])[rules]
        live = np.where(holds_all, count, np.minimum(count, ranks))
        return np.asarray(((priced.state_bytes @ number)[rows] + live * kept[rows]) / (ranks * self.room_bytes))

    def any_order_s(self, incumbent_s: float) -> float:
        """Return a bound for every order of the actions on every configuration, `auto` included.

        Work and the longest layer, and where that is below the incumbent, all ranks' memory over time (`pool_admits`).
        """
        rows = np.flatnonzero(self.work_s < incumbent_s)
        if not len(rows) or self.limits.reached() is not None:
            return min(float(self.work_s.min(initial=float("inf"))), self.unpriced_s)
        extra_s = self.problem.profile.step_overhead_s
        high_s = incumbent_s if np.isfinite(incumbent_s) else 16.0 * float(self.work_s.min())
        ones = np.ones(len(rows), dtype=np.int64)
        anything = Outlines(rows, KINDS["both ways"] * ones, LIVE["one"] * ones, ones, ones, ones > 0)
        low_s = self.work_s[rows] - extra_s
        found = refined(low_s, high_s - extra_s, 10, anything, self.priced.shape, self.prices[True])
        return float(min(high_s, found.min() + extra_s, self.unpriced_s))
