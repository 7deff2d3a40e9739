"""The joint search: the whole space bounded, the promising candidates solved in order of bound, the best one certified.

    1  price      every configuration, by class of layers; states and one microbatch must fit; bound any order
    2  cross      with schedules and chunks; bound by the family's closed form
    3  incumbent  complete and simulate the most promising candidates, improve the best
    4  close      with target X = incumbent / (1 + gap), in order of bound: caps, then cuts in a linear program without
                  and with memory (`closing`)
    5  branch     what is still open, the least bound first: whole layers, levels and workspaces (`branching`)

At most MOST_PROGRAMS candidates go through linear programs; what is left then keeps its bound, and the gap says so.
A candidate that is closed has no completion below X. The proved bound is the least of X (or the incumbent, at gap 0) and
the bounds of what was left open. Everything that is enumerated here is the declared space of the certificate.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stagewright.planner.cores import on_cores
from stagewright.planner.cost.least_work import least_step_s
from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.search.bounds import KINDS, family_bounds, memory_possible, work_bounds
from stagewright.planner.search.candidate_costs import CandidateCosts, RankSlots, RunCosts, rank_tables
from stagewright.planner.search.caps import RankTables, caps_reach, largest_class, order_caps
from stagewright.planner.search.class_prices import ClassPrices, class_prices, prices_of
from stagewright.planner.search.closing import MOST_NODES, Closed, Closer
from stagewright.planner.search.exact_levels import with_exact_levels
from stagewright.planner.search.incumbent import MOST_STEPS, TRIES, Completion, improve, start
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.order import Layout, Order, OrderKey
from stagewright.planner.search.pricing import (
    AXES,
    CP,
    DP,
    NUM_MICROBATCHES,
    PP,
    SP,
    TP,
    Priced,
    configuration_of,
    unique_rows,
)
from stagewright.planner.search.problem import Candidate, Partition, Problem, pipeline_ranks
from stagewright.planner.search.rank_reach import reaches
from stagewright.planner.search.refinement import LIVE, Outlines, refined, taken
from stagewright.planner.search.row_leaders import RowLeaders
from stagewright.planner.search.space import PIPELINE_OUTSIDE, FamilyRule, schedule_sizes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

NUM_REFINED = 240
_AHEAD = 512  # candidates whose caps are looked at together
_CHUNK = 64  # candidates refined between two looks at the clock
_PRICING = 0.3  # share of a deadline that pricing may take
_EVALUATED_S = 1e-8  # for each action of an order, of one evaluation by local search
LEAST_ANSWERED_S = 0.1
NUM_FIRST = 12
NUM_STARTS = 24
NUM_TRIED, NUM_ALIKE = 96, 2
MOST_PROGRAMS = 20_000
MOST_NODES_IN_ALL = 3_000
# Candidates that are closed, and branched, at once, whatever the number of cores: the answer is the same.
AT_ONCE, WHOLE_AT_ONCE = 4, 2
ROAMED = ((8, 100), (2, 400))  # candidates and moves tried of each
NUM_IMPROVED = 12


@dataclass(frozen=True, eq=False)
class Solution:
    """A completed candidate by index."""

    index: int
    completion: Completion


class _Pending(NamedTuple):
    """A candidate (its index) that needs a program, with the layers of the largest class that its ranks may hold."""

    at: int
    costs: CandidateCosts
    rank_layers: tuple[Longs, Longs] | None


@dataclass(eq=False)
class JointSearch:
    """The state of one search."""

    problem: Problem
    limits: Limits
    best: Solution | None = None
    found: dict[int, Completion] = field(default_factory=dict)
    pruned: dict[str, int] = field(default_factory=dict)
    evaluated: int = 0
    simulated: int = 0
    open_bound_s: float = float("inf")
    _costs: dict[int, CandidateCosts] = field(default_factory=dict)
    _slots: dict[OrderKey, RankSlots] = field(default_factory=dict)
    _rank_slots: dict[int, tuple[Layout, RankSlots]] = field(default_factory=dict)
    _looked_at: set[int] = field(default_factory=set)
    _out_of_reach: set[int] = field(default_factory=set)
    _lines: dict[tuple[object, ...], tuple[Floats, Floats]] = field(default_factory=dict)

    # ---- the space -------------------------------------------------------------------------------------------------

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
        self.count("not priced", unpriced)
        if not unpriced:
            return float("inf")
        return least_step_s(self.problem.model(PIPELINE_OUTSIDE), max(self.problem.device_counts))

    @cached_property
    def priced(self) -> Priced:
        """Configurations that might fit."""
        unpriced = self._shapes[1]
        priced = self.problem.priced if not unpriced else self.problem.price_list.price(self._shapes[0])
        possible = memory_possible(priced, self.problem.classes, self.room_bytes, self.levels)
        self.count("memory", int((~possible).sum()))
        return priced.take(np.flatnonzero(possible))

    @cached_property
    def _class_prices(self) -> tuple[ClassPrices, ClassPrices]:
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
    def work_s(self) -> Floats:
        profile = self.problem.profile
        return work_bounds(self.priced, self.problem.classes, profile.action_overhead_s, profile.step_overhead_s)

    @cached_property
    def crossed(self) -> tuple[Longs, Longs, Longs]:
        """Row, rule and chunks of each candidate."""
        shape = self.priced.shape
        pairs, where = unique_rows(shape[:, [PP, NUM_MICROBATCHES]])
        rules = self.problem.rules
        sizes = [
            [
                (rules.index(rule), chunks)
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
        chosen = table[starts[where[rows]] + within]
        return rows, chosen[:, 0], chosen[:, 1]

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

    def any_order_s(self) -> float:
        """Return a bound for every order of the actions on every configuration, `auto` included.

        Work and the longest layer, and where that is below the incumbent, all ranks' memory over time (`pool_admits`).
        """
        rows = np.flatnonzero(self.work_s < self.incumbent_s)
        if not len(rows) or self.limits.reached() is not None:
            return min(float(self.work_s.min(initial=float("inf"))), self.unpriced_s)
        extra_s = self.problem.profile.step_overhead_s
        high_s = self.incumbent_s if self.best is not None else 16.0 * float(self.work_s.min())
        ones = np.ones(len(rows), dtype=np.int64)
        anything = Outlines(rows, KINDS["both ways"] * ones, LIVE["one"] * ones, ones, ones, ones > 0)
        low_s = self.work_s[rows] - extra_s
        found = refined(low_s, high_s - extra_s, 10, anything, self.priced.shape, self._class_prices[True])
        return float(min(high_s, found.min() + extra_s, self.unpriced_s))

    @property
    def num_candidates(self) -> int:
        return len(self.crossed[0])

    def count(self, reason: str, number: int = 1) -> None:
        """Count candidates (or configurations) that left for a reason."""
        if number:
            self.pruned[reason] = self.pruned.get(reason, 0) + number

    # ---- one candidate ---------------------------------------------------------------------------------------------

    def rule(self, index: int) -> FamilyRule:
        """Return a candidate's family."""
        return self.problem.rules[int(self.crossed[1][index])]

    def candidate(self, index: int) -> Candidate:
        """Return a candidate as a record."""
        row = self.priced.shape[int(self.crossed[0][index])]
        return Candidate(configuration_of(row), self.rule(index), int(self.crossed[2][index]))

    def key(self, index: int) -> OrderKey:
        """Return the key of a candidate's order."""
        row = self.priced.shape[int(self.crossed[0][index])]
        return OrderKey(self.rule(index).name, int(row[PP]), int(row[NUM_MICROBATCHES]), int(self.crossed[2][index]))

    def costs(self, index: int) -> CandidateCosts | None:
        """Return a candidate's costs; None when the family refuses its sizes."""
        if index not in self._costs:
            try:
                order = self.problem.order_of(self.key(index), self.rule(index))
            except (InvalidArgument, InvalidSchedule):
                self.count("schedule")
                self.bound_s[index] = np.inf
                return None
            self._costs[index] = self._make_costs(index, order)
        return self._costs[index]

    def _make_costs(self, index: int, order: Order) -> CandidateCosts:
        row = int(self.crossed[0][index])
        priced, classes, profile = self.priced, self.problem.classes, self.problem.profile
        cuts = np.append(priced.cut_bytes[row][classes.of_layer], 0.0)
        latency, per_byte = self._hop_lines(row, order)
        replica_s, replica_latency_s = self._replica_terms(row, order)
        key = order.key
        if key not in self._slots:
            self._slots[key] = RankSlots.of(order)
        return CandidateCosts(
            order=order,
            slots=self._slots[key],
            classes=classes,
            runs=self._run_costs(row, order),
            hop_latency_s=latency,
            hop_s_per_byte=per_byte,
            cut_bytes=cuts,
            stage_latency_s=float(priced.latency_s[row]),
            overhead_s=profile.action_overhead_s,
            constant_tail_s=np.zeros(order.num_ranks),
            ties=self.problem.tie_seconds(configuration_of(priced.shape[row])),
            replica_s=replica_s,
            replica_latency_s=replica_latency_s,
            capacity_bytes=self.room_bytes,
            levels=self.levels,
            step_overhead_s=profile.step_overhead_s,
        )

    def _run_costs(self, row: int | Longs, layout: Layout) -> RunCosts:
        """Return what the layers of each run cost under a configuration, or several, on any order with the layout's backwards."""
        priced, classes = self.priced, self.problem.classes
        of_run = classes.run_class
        return RunCosts(
            length=classes.run_length.astype(np.int64),
            forward_s=priced.forward_s[row].take(of_run, axis=-1),
            input_grad_s=priced.input_grad_s[row].take(of_run, axis=-1),
            weight_grad_s=priced.weight_grad_of(row, layout).take(of_run, axis=-1),
            recompute_s=priced.recompute_s[row].take(of_run, axis=-1),
            kept_bytes=priced.kept_bytes[row].take(of_run, axis=-1),
            late_bytes=priced.late_bytes[row].take(of_run, axis=-1),
            workspace_bytes=priced.workspace_of(defers=layout.defers)[row].take(of_run, axis=-1),
            state_bytes=priced.state_bytes[row].take(of_run, axis=-1),
            step_s=priced.step_s[row].take(of_run, axis=-1),
        )

    def _replica_terms(self, row: int, order: Order) -> tuple[Floats, Floats]:
        if order.num_replicas == 1:
            return np.zeros(0), np.zeros(0)
        each_s, once_s = self.problem.replica_terms(
            configuration_of(self.priced.shape[row]), order.placement, self.priced.gradient_bytes[row]
        )
        return each_s[self.problem.classes.run_class], once_s

    def _hop_lines(self, row: int, layout: Layout) -> tuple[Floats, Floats]:
        """Return latency and seconds a byte of each hop."""
        shape = self.priced.shape[row]
        reference_bytes = float(self.priced.cut_bytes[row][self.problem.classes.of_layer].max())
        places = (TP, SP, AXES, CP, DP, PP)
        key = (
            *(int(shape[place]) for place in places),
            reference_bytes,
            layout.placement.shape,
            layout.placement.tobytes(),
        )
        if key not in self._lines:
            self._lines[key] = self.problem.wiring_for(configuration_of(shape), reference_bytes).lines(layout.hop_pairs)
        return self._lines[key]

    # ---- the run ---------------------------------------------------------------------------------------------------

    @property
    def incumbent_s(self) -> float:
        return self.best.completion.step_s if self.best is not None else float("inf")

    @property
    def target_s(self) -> float:
        """A candidate that cannot get below this is closed."""
        known_s = float("inf") if self.limits.known is None else self.limits.known.least_s()
        return min(self.incumbent_s, known_s) / (1.0 + self.limits.gap)

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
        costs = self.costs(index)
        assert costs is not None
        if completion.judged or not costs.may_wait(completion.counts, completion.bounds):
            return completion
        partition = self.partition(index, completion)
        step_s = max(completion.step_s, self.problem.judged_step_s(self.candidate(index), partition))
        return replace(completion, step_s=step_s, judged=True)

    def run(self) -> tuple[float, Termination]:
        """Search; return the proved bound and why the search ended."""
        bound_s, stopped = self._run() if self.num_candidates else (float("inf"), "gap")
        if self.best is not None:
            costs = self.costs(self.best.index)
            assert costs is not None
            self.keep(self.best.index, with_exact_levels(costs, self.best.completion, self._is_late))
            bound_s = min(bound_s, self.incumbent_s)
        if self.unpriced_s < bound_s:
            return self.unpriced_s, "time_limit"
        return bound_s, stopped

    def _is_late(self) -> bool:
        return self.limits.reached() is not None

    def _run(self) -> tuple[float, Termination]:
        """Search what was priced."""
        stopped = self._find_incumbents()
        if stopped is not None:
            return float(min(self.bound_s.min(), self.incumbent_s)), stopped
        return self._close_all()

    def _refine(self, chosen: Longs, high_s: float, steps: int) -> None:
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
                self._class_prices[defers],
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

    def _find_incumbents(self) -> Termination | None:
        """Complete the most promising candidates: first where the caps are tight, then everywhere."""
        if self.limits.deadline_s is not None:
            # An answer first: what comes behind may take all the time there is.
            guessed = np.argsort(self.estimate(np.arange(self.num_candidates)), kind="stable")
            stopped = self._begin(guessed[:NUM_FIRST].tolist())
            if stopped is not None:
                return stopped
        bound_kinds = np.array([KINDS[rule.bound] for rule in self.problem.rules])[self.crossed[1]]
        tight = np.flatnonzero((bound_kinds == KINDS["uniform"]) | (bound_kinds == KINDS["gpipe"]))
        chosen = tight[np.argsort(self.bound_s[tight], kind="stable")][:NUM_REFINED]
        self._refine(chosen, 4.0 * float(self.bound_s.min()), 10)
        chosen = chosen[np.argsort(self.bound_s[chosen], kind="stable")]
        stopped = self._begin(chosen[:NUM_FIRST].tolist())
        if stopped is not None:
            return stopped
        high_s = self.incumbent_s if self.best is not None else 16.0 * float(self.bound_s.min())
        # The bound of a row that leads others is theirs; their own is raised only where that leaves them open.
        leading, followers, leaders = self._leaders(np.flatnonzero(self.bound_s < self.target_s))
        self._refine(leading, high_s / (1.0 + self.limits.gap) if self.best is not None else high_s, 0)
        self.bound_s[followers] = np.maximum(self.bound_s[followers], self.bound_s[leaders])
        left = np.flatnonzero(self.bound_s < self.target_s)
        return self._begin(self._promising(left), NUM_STARTS)

    def _promising(self, chosen: Longs) -> list[int]:
        """Return candidates in order of what a start with few microbatches promises, then the others by estimate.

        Some of each pipeline depth and schedule are started; rows that another row undercuts and pairs of replicas are not.
        """
        leading = self._leaders(chosen)[0]
        leading = leading[np.argsort(self.estimate(leading), kind="stable")].tolist()
        tried: dict[OrderKey, int] = {}
        found: list[tuple[float, int]] = []
        for index in leading:
            key = self.key(index)._replace(num_microbatches=0)
            if len(found) >= NUM_TRIED or self.limits.reached() is not None:
                break
            if tried.get(key, 0) >= NUM_ALIKE or self.rule(index).num_replicas > 1:
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
        try:
            order = self.problem.short_order_of(self.key(index), self.rule(index))
        except (InvalidArgument, InvalidSchedule):
            return None
        costs = self._make_costs(index, order)
        self.simulated += 1
        completion = start(costs)
        if completion is None:
            return None
        left = self.key(index).num_microbatches - order.key.num_microbatches
        if left == 0:
            self._costs[index] = costs
            self.keep(index, completion)
        on_stage = costs.stage_costs(completion.counts).sum(axis=0)
        on_rank = np.where(costs.slots.stage >= 0, on_stage[costs.slots.stage], 0.0).sum(axis=1)
        return completion.step_s + left / order.num_replicas * float(on_rank.max())

    def _begin(self, chosen: Sequence[int], most: int | None = None) -> Termination | None:
        """Complete candidates until `most` were tried, and improve the best of them.

        A deadline of LEAST_ANSWERED_S or more does not end the first few tries, so that a late search has something to
        answer.
        """
        in_haste = self.limits.deadline_s is not None and self.limits.deadline_s < LEAST_ANSWERED_S
        begun: list[tuple[float, int]] = []
        tried = 0
        for index in chosen:
            if most is not None and tried >= most and self.best is not None:
                break
            if self.bound_s[index] >= self.target_s:
                continue
            stopped = self.limits.reached() if tried % 8 == 0 else None
            if stopped is not None and (
                in_haste or self.best is not None or stopped == "cancelled" or tried >= NUM_FIRST
            ):
                return stopped
            costs = self.costs(index)
            if costs is None:
                continue
            tried += 1
            self.simulated += 1
            completion = start(costs)
            if completion is not None:
                self.keep(index, completion)
                begun.append((completion.step_s, index))
        self.limits.report("incumbents", tried, tried, self._known(), float(self.bound_s.min()))
        for _, index in sorted(begun)[:NUM_IMPROVED]:
            if self.limits.reached() is not None:
                break
            costs = self.costs(index)
            assert costs is not None
            steps = self._moves_in_time(costs.order)
            better, made = improve(costs, self.found[index].bounds, most_steps=steps)
            self.simulated += made
            if better is not None:
                self.keep(index, better)
        return self.limits.reached()

    def _moves_in_time(self, order: Order) -> int:
        """Return how many steps local search may take on an order before the deadline, at least one."""
        if self.limits.deadline_s is None:
            return MOST_STEPS
        each_s = TRIES * _EVALUATED_S * len(order.before)
        return max(1, min(MOST_STEPS, int(self.limits.left_s() / each_s)))

    def _known(self) -> float | None:
        return None if self.best is None else self.incumbent_s

    def _close_all(self) -> tuple[float, Termination]:
        """Close candidates in order of bound until none is left below the target.

        A candidate whose row another one undercuts waits for the same family and chunks on that row: it is closed with it,
        or inherits the bound that it was left with.
        """
        closer = Closer(self.limits)
        left = np.flatnonzero(self.bound_s < self.target_s)
        self.count("bound", self.num_candidates - len(left))
        leading, followers, leaders = self._leaders(left)
        waiting: dict[int, list[int]] = {}
        for follower, leader in zip(followers.tolist(), leaders.tolist(), strict=True):
            waiting.setdefault(leader, []).append(follower)
        opened: dict[int, float] = {}
        heap = list(zip(self.bound_s[leading].tolist(), leading.tolist(), strict=True))
        heapq.heapify(heap)
        num_left = len(leading) + len(followers)
        self.count("dominated", len(left) - num_left)
        done = num_programs = 0
        pending: dict[OrderKey, _Pending] = {}
        while heap or pending:
            if not heap or len(pending) == AT_ONCE or heap[0][0] >= self.target_s or self.key(heap[0][1]) in pending:
                if not pending:
                    self.count("bound", num_left)
                    break
                closed = self._close_pending(list(pending.values()), closer)
                num_programs += len(pending)
                pending.clear()
            else:
                bound_s, index = heapq.heappop(heap)
                stopped = self.limits.reached()
                if stopped is not None or num_programs >= MOST_PROGRAMS:
                    self.count("left open", num_left)
                    self.count("open", sum(left_s < self.target_s for left_s in opened.values()))
                    return min([bound_s, self.incumbent_s, *opened.values()]), stopped or "time_limit"
                if index not in self._looked_at and self.limits.deadline_s is None:
                    self._look_ahead([index, *(other for _, other in heapq.nsmallest(_AHEAD, heap))])
                found = self._close_at_once(index, closer)
                if isinstance(found, _Pending):
                    pending[self.key(index)] = found
                    continue
                closed = [(index, found)]
            for index, bound_s in closed:
                done += 1
                num_left -= 1
                self.bound_s[index] = max(self.bound_s[index], bound_s)
                behind = waiting.pop(index, [])
                if bound_s < self.target_s:
                    opened[index] = bound_s
                    self._refine(np.array(behind, dtype=np.int64), self.target_s, 0)
                    for other in behind:
                        heapq.heappush(heap, (float(max(self.bound_s[other], bound_s)), other))
                else:
                    self.count("dominated", len(behind))
                    num_left -= len(behind)
                if done % 64 == 0:
                    least = min([self.target_s, *(pair[0] for pair in heap[:1]), *opened.values()])
                    self.limits.report("closing", done, done + len(heap), self._known(), least)
        self._roam(opened)
        return self._close_whole(opened, closer)

    def _roam(self, opened: dict[int, float]) -> None:
        """Look for better completions of what linear programs left open, longer where a short look found more.

        Branching is dear, and each per mille here is a per mille off its target. One candidate stands for its order.
        """
        orders: dict[OrderKey, int] = {}
        for index in sorted(opened, key=opened.__getitem__):
            if index in self.found and opened[index] < self.target_s:
                orders.setdefault(self.key(index), index)
        left = list(orders.values())[: ROAMED[0][0]]
        for kept, moves in ROAMED:
            left = sorted(left, key=lambda index: self.found[index].step_s)[:kept]
            chosen = [index for index in left if opened[index] < self.target_s and self.limits.reached() is None]
            moved = on_cores(partial(self._moved_on, moves, self.target_s), [(i, self.costs(i)) for i in chosen])
            for index, (better, made) in zip(chosen, moved, strict=True):
                self.simulated += made
                if better is not None:
                    self.keep(index, better)

    def _moved_on(
        self, moves: int, least_s: float, item: tuple[int, CandidateCosts | None]
    ) -> tuple[Completion | None, int]:
        index, costs = item
        if costs is None or self.limits.reached() is not None:
            return None, 0
        return improve(costs, self.found[index].bounds, most_moves=moves, least_s=least_s)

    def _close_whole(self, opened: dict[int, float], closer: Closer) -> tuple[float, Termination]:
        """Close what linear programs left open by branching, always the one of least bound, until one stays open.

        The least bound is the proof, so the others would not raise it.
        """
        heap = [(bound_s, index) for index, bound_s in opened.items()]
        heapq.heapify(heap)
        left_nodes = MOST_NODES_IN_ALL
        while heap and heap[0][0] < self.target_s:
            stopped = self.limits.reached()
            if stopped is not None:
                self.count("open", len(heap))
                return heap[0][0], stopped
            chosen: dict[OrderKey, tuple[float, int]] = {}
            while heap and len(chosen) < WHOLE_AT_ONCE and self.key(heap[0][1]) not in chosen:
                if heap[0][0] >= self.target_s:
                    break
                pair = heapq.heappop(heap)
                chosen[self.key(pair[1])] = pair
            pairs = [(index, bound_s) for bound_s, index in chosen.values()]
            nodes = min(MOST_NODES, left_nodes // len(pairs))
            is_open = False
            for (index, bound_s), closed in zip(pairs, self._branched(pairs, nodes, closer), strict=True):
                left_nodes -= closed.num_nodes
                self.simulated += closed.simulated
                if closed.completion is not None:
                    self.keep(index, closed.completion)
                raised_s = max(bound_s, closed.bound_s)
                if raised_s < self.target_s:
                    heapq.heappush(heap, (raised_s, index))
                    is_open = is_open or heap[0][1] == index
                else:
                    self.count("branching" if closed.reason == "open" else closed.reason)
            if is_open:
                break
        self.count("open", sum(bound_s < self.target_s for bound_s, _ in heap))
        return min([self.target_s, *(bound_s for bound_s, _ in heap)]), "gap"

    def _branched(self, pairs: Sequence[tuple[int, float]], most_nodes: int, closer: Closer) -> list[Closed]:
        """Return what branching proves of some candidates of different orders with their bounds."""
        target_s, incumbent_s = self.target_s, self.incumbent_s
        caps = [self._order_caps(index) for index, _ in pairs]

        def branched(place: int) -> Closed:
            (index, bound_s), (reach, rank_layers) = pairs[place], caps[place]
            if not reach:
                return Closed(target_s, "caps")
            costs = self.costs(index)
            assert costs is not None
            judge = partial(self.judged, index)
            return closer.close_whole(costs, bound_s, target_s, incumbent_s, rank_layers, judge, most_nodes)

        return on_cores(branched, range(len(pairs)))

    def _leaders(self, chosen: Longs) -> tuple[Longs, Longs, Longs]:
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

    def _close_at_once(self, index: int, closer: Closer) -> float | _Pending:
        """Return the target as a bound of the candidate where that is quickly proved, else what a program needs."""
        if index in self._out_of_reach:
            self.count("caps")
            return self.target_s
        reach, rank_layers = self._order_caps(index)
        if not reach:
            self.count("caps")
            return self.target_s
        costs = self.costs(index)
        if costs is None:
            return self.target_s
        if self.rule(index).live == "one" and not self._caps_reach(index, costs.order):
            self.count("caps")
            return self.target_s
        self.evaluated += 1
        known = closer.close_by_known(costs, self.target_s, rank_layers)
        if known is None:
            return _Pending(index, costs, rank_layers)
        self.count(known.reason)
        return known.bound_s

    def _close_pending(self, pending: Sequence[_Pending], closer: Closer) -> list[tuple[int, float]]:
        """Return a bound of each of some candidates of different orders: at least the target, or the best that was proved."""
        target_s, incumbent_s = self.target_s, self.incumbent_s

        def closed_of(one: _Pending) -> Closed:
            judge = partial(self.judged, one.at)
            return closer.close(one.costs, target_s, incumbent_s, one.rank_layers, judge)

        found = on_cores(closed_of, pending)
        for one, closed in zip(pending, found, strict=True):
            self.simulated += closed.simulated
            if closed.reason != "open":
                self.count(closed.reason)
            if closed.completion is not None:
                self.keep(one.at, closed.completion)
        return [(one.at, closed.bound_s) for one, closed in zip(pending, found, strict=True)]

    def _layout(self, index: int) -> Layout:
        return self.problem.layout_of(self.key(index), self.rule(index))

    def _order_caps(self, index: int) -> tuple[bool, tuple[Longs, Longs] | None]:
        """Tell whether the caps of the order's own live vectors reach the target, and each rank's range of layers."""
        outline = self.problem.outline_of(self.key(index), self.rule(index))
        if outline is not None and not self._layout_caps(index, outline)[0]:
            return False, None
        try:
            layout = self._layout(index)
        except (InvalidArgument, InvalidSchedule):
            return True, None
        return self._layout_caps(index, layout)

    def _layout_caps(self, index: int, layout: Layout) -> tuple[bool, tuple[Longs, Longs] | None]:
        row, classes = int(self.crossed[0][index]), self.problem.classes
        count = int(self.priced.shape[row, NUM_MICROBATCHES])
        tables = self._rank_tables(row, self.priced.latency_s[row : row + 1], layout)
        reach, caps = order_caps(tables, count, self.target_s)
        if not reach:
            return False, None
        number = layout.num_replicas * largest_class(classes.run_class, tables.run_start[1:] - tables.run_start[:-1])[1]
        return True, (np.maximum(number - (caps.sum() - caps), 0), caps)

    def _rank_tables(self, row: int | Longs, latency_s: Floats, layout: Layout) -> RankTables:
        """Return a configuration, or several, on the slots of a layout as the caps see it."""
        if id(layout) not in self._rank_slots:  # layouts are kept beside their slots, so ids stay
            self._rank_slots[id(layout)] = layout, RankSlots.of(layout)
        return rank_tables(
            layout,
            self._rank_slots[id(layout)][1],
            self.problem.classes,
            self._run_costs(row, layout),
            levels=self.levels,
            stage_latency_s=latency_s,
            overhead_s=self.problem.profile.action_overhead_s,
            constant_tail_s=np.zeros(layout.num_ranks),
            capacity_bytes=self.room_bytes,
            step_overhead_s=self.problem.profile.step_overhead_s,
        )

    def _look_ahead(self, indices: Sequence[int]) -> None:
        """Note which candidates the caps of their orders close at the target, all of one layout at once."""
        of_layout: dict[int, tuple[Layout, list[int]]] = {}
        for index in indices:
            if index in self._looked_at:
                continue
            self._looked_at.add(index)
            try:
                layout = self.problem.outline_of(self.key(index), self.rule(index)) or self._layout(index)
            except (InvalidArgument, InvalidSchedule):
                continue
            of_layout.setdefault(id(layout), (layout, []))[1].append(index)
        for layout, together in of_layout.values():
            rows = self.crossed[0][together]
            tables = self._rank_tables(rows, self.priced.latency_s[rows], layout)
            counts = self.priced.shape[rows, NUM_MICROBATCHES].astype(np.int64)
            reached = caps_reach(tables, counts, self.target_s)
            self._out_of_reach.update(
                index for index, reach in zip(together, reached.tolist(), strict=True) if not reach
            )

    def _caps_reach(self, index: int, order: Order) -> bool:
        row, rule = int(self.crossed[0][index]), self.rule(index)
        ranks, count = (int(size) for size in self.priced.shape[row, [PP, NUM_MICROBATCHES]])
        live, late = _least_live(self._slots[order.key])
        prices: ClassPrices = prices_of(self._class_prices[order.defers], row)
        return bool(
            reaches(
                self.target_s - self.problem.profile.step_overhead_s,
                KINDS[rule.bound],
                ranks,
                count,
                int(self.crossed[2][index]),
                np.zeros(max(ranks - 1, 0)),
                live,
                late,
                prices._replace(weight_grad_s=self.priced.weight_grad_of(row, order)),
            )
        )

    def partition(self, index: int, completion: Completion) -> Partition:
        """Return a completion as bounds and levels."""
        costs = self.costs(index)
        assert costs is not None
        return Partition(completion.bounds, costs.levels_of(completion.counts, completion.bounds))


_IDLE = {
    "zb-h1": 0.4,
    "zb-h2": 0.1,
    "zb-v": 0.1,
    "v-half": 1.0,
    "dualpipe-v": 0.4,
    "dualpipe": 0.4,
    "interleaved-zb": 0.3,
}


def _least_live(slots: RankSlots) -> tuple[Floats, Floats]:
    """Return the pair of multiplicities that every slot of a rank has at one time, the heaviest such pair, [D], [D]."""
    held = slots.stage[:, None, :] >= 0
    first, second = (np.where(held, slots.live[:, :, part], np.inf).min(axis=2) for part in (0, 1))
    best = np.argmax(first + second, axis=1)[:, None]
    live, late = (np.take_along_axis(values, best, axis=1)[:, 0] for values in (first, second))
    return np.maximum(live, 0.0), late


def ranks_of(candidate: Candidate) -> Sequence[Sequence[int]]:
    """Return the global ranks of a candidate's pipeline ranks."""
    return pipeline_ranks(candidate.configuration)
