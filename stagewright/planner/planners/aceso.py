"""Aceso's search (Liu et al., EuroSys 2024): find the bottleneck, relieve its scarce resource, repeat, several moves deep.

    state      a configuration (dp, tp, pp, microbatch, ZeRO) and stage boundaries; recomputation follows from memory
    bottleneck the stage that overruns its memory most, else the slowest one
    primitives move layers from the bottleneck to the stage with most slack, however far (`move-ops`)
               dp, tp, pp and the microbatch up or down by one step, the devices kept (`inc/dec-*`)
               recompute more or fewer layers: greedily by bytes saved for each second, as many as the stage must
    search     accept the first primitive that improves; else go on from the best rejected states, HOPS deep; states seen
               are never evaluated again; start once from every depth, balanced by time

The objective is Aceso's own: sum t + (B - 1) max t over the stages, gradient reduction added. Anytime, no optimality:
a local optimum of these moves. An evaluation is O(L), a round O(D L): a thousand layers take seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.reach import Reach, configurations, rule_of
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import Choice, choices_outcome
from stagewright.planner.search.layer_costs import Configuration, LayerCosts
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Candidate, Partition, Problem

Floats = npt.NDArray[np.float64]

HOPS = 3
WIDTH = 4
NUM_STARTS = 24

State = tuple[Configuration, tuple[int, ...]]


@dataclass(frozen=True)
class Estimate:
    """What Aceso thinks of a state: its objective, and of each stage the seconds and the bytes it overruns."""

    value: float
    stage_s: tuple[float, ...]
    over_bytes: tuple[float, ...]
    levels: tuple[int, ...]

    @property
    def rank(self) -> tuple[float, float]:
        """Order of states: what fits first, then what is faster."""
        return (max(0.0, *self.over_bytes), self.value)

    @property
    def bottleneck(self) -> int:
        worst = max(self.over_bytes)
        return self.over_bytes.index(worst) if worst > 0 else self.stage_s.index(max(self.stage_s))


@dataclass(eq=False)
class AcesoSearch:
    """One search over a problem's configurations."""

    problem: Problem
    limits: Limits
    neighbours: dict[Configuration, list[Configuration]]
    seen: dict[State, Estimate] = field(default_factory=dict)
    _stages: dict[tuple[Configuration, int, int, int], tuple[float, float, tuple[int, ...]]] = field(
        default_factory=dict
    )

    def estimate(self, state: State) -> Estimate:
        """Return the estimate of a state, computed once."""
        if state not in self.seen:
            self.seen[state] = self._estimate(*state)
        return self.seen[state]

    def _estimate(self, configuration: Configuration, bounds: tuple[int, ...]) -> Estimate:
        count, ranks = configuration.num_microbatches, configuration.num_ranks
        costs = self.problem.costs(configuration)
        stages = [
            self._stage(configuration, costs, first, end, min(count, ranks - stage))
            for stage, (first, end) in enumerate(pairwise(bounds))
        ]
        seconds = [stage[0] for stage in stages]
        reduction = max(float(costs.tail_s[first:end].sum()) for first, end in pairwise(bounds))
        value = sum(seconds) + (count - 1) * max(seconds) + reduction
        levels = tuple(level for stage in stages for level in stage[2])
        return Estimate(value, tuple(seconds), tuple(stage[1] for stage in stages), levels)

    def _stage(
        self, configuration: Configuration, costs: LayerCosts, first: int, end: int, in_flight: int
    ) -> tuple[float, float, tuple[int, ...]]:
        """Return a stage's seconds, the bytes it overruns, and its levels, chosen greedily."""
        key = (configuration, first, end, in_flight)
        if key not in self._stages:
            room = self.problem.capacity_bytes - self.problem.base_bytes - float(costs.static_bytes[first:end].sum())
            levels, over = greedy_levels(costs, first, end, in_flight, room, self.problem.levels)
            at = (np.array(levels), np.arange(first, end))
            seconds = float(costs.time_s[first:end].sum() + costs.recompute_s[at].sum())
            seconds += 2.0 * self.problem.profile.action_overhead_s
            self._stages[key] = (seconds, over, levels)
        return self._stages[key]

    def climb(self, start: State) -> State:
        """Return the best state that moves reach from `start`."""
        best = start
        while self.limits.reached() is None:
            better = self._better(best)
            if better is None:
                return best
            best = better
        return best

    def _better(self, state: State) -> State | None:
        """Return a state that beats `state` within HOPS moves, or None."""
        rank = self.estimate(state).rank
        wave = [state]
        tried = {state}
        for _ in range(HOPS):
            fresh = [move for known in wave for move in self._moves(known) if move not in tried]
            fresh = list(dict.fromkeys(fresh))
            tried.update(fresh)
            if not fresh:
                return None
            fresh.sort(key=lambda move: self.estimate(move).rank)
            if self.estimate(fresh[0]).rank < rank:
                return fresh[0]
            wave = fresh[:WIDTH]
        return None

    def _moves(self, state: State) -> Iterator[State]:
        configuration, bounds = state
        found = self.estimate(state)
        giver = found.bottleneck
        order = sorted(range(len(found.stage_s)), key=lambda stage: (found.stage_s[stage], stage))
        size = bounds[giver + 1] - bounds[giver]
        for taker in order[: WIDTH + 2]:
            for number in (1, 2, max(1, size // 8), max(1, size // 4)):
                if taker != giver and number < size:
                    yield configuration, shift(bounds, giver, taker, number)
        for other in self.neighbours.get(configuration, ()):
            if other.num_ranks == configuration.num_ranks:
                yield other, bounds
            else:
                yield other, self.balanced(other)

    def balanced(self, configuration: Configuration) -> tuple[int, ...]:
        """Return bounds that give each stage about the same time."""
        return even_bounds(self.problem.costs(configuration).time_s, configuration.num_ranks)


def greedy_levels(
    costs: LayerCosts, first: int, end: int, in_flight: int, room_bytes: float, levels: Iterable[int]
) -> tuple[tuple[int, ...], float]:
    """Return the level of each layer, raised by most bytes for each second until the stage fits, and what it overruns."""
    allowed = sorted(levels)
    chosen = np.full(end - first, allowed[0], dtype=np.int64)
    layers = np.arange(first, end)
    saved = in_flight * (costs.kept_bytes[allowed[0], layers][None] - costs.kept_bytes[allowed][:, layers])
    price = costs.recompute_s[allowed][:, layers] - costs.recompute_s[allowed[0], layers][None]
    need = in_flight * float(costs.kept_bytes[chosen, layers].sum()) - room_bytes
    if need + float(costs.workspace_bytes[chosen, layers].max()) <= 0:
        return tuple(chosen.tolist()), 0.0
    moves = [
        (-float(saved[row, place]) / max(float(price[row, place]), 1e-15), place, row)
        for row in range(1, len(allowed))
        for place in range(end - first)
        if saved[row, place] > 0
    ]
    held = np.zeros(end - first)
    for _, place, row in sorted(moves):
        if saved[row, place] <= held[place]:
            continue
        need -= float(saved[row, place] - held[place])
        held[place] = saved[row, place]
        chosen[place] = allowed[row]
        if need + float(costs.workspace_bytes[chosen, layers].max()) <= 0:
            return tuple(chosen.tolist()), 0.0
    return tuple(chosen.tolist()), max(0.0, need + float(costs.workspace_bytes[chosen, layers].max()))


def shift(bounds: tuple[int, ...], giver: int, taker: int, number: int) -> tuple[int, ...]:
    """Return bounds after `number` layers left stage `giver` towards `taker`; stages between pass them on."""
    moved = list(bounds)
    step = -number if giver < taker else number
    for index in range(min(giver, taker) + 1, max(giver, taker) + 1):
        moved[index] += step
    return tuple(moved)


def even_bounds(seconds: Floats, num_stages: int) -> tuple[int, ...]:
    """Return bounds at equal shares of the seconds, every stage with a layer."""
    before = np.cumsum(seconds)
    bounds = [0]
    for stage in range(1, num_stages):
        cut = int(np.searchsorted(before, before[-1] * stage / num_stages)) + 1
        bounds.append(min(max(cut, bounds[-1] + 1), len(seconds) - (num_stages - stage)))
    return (*bounds, len(seconds))


def adjacent(found: list[Configuration]) -> dict[Configuration, list[Configuration]]:
    """Return for each configuration those one primitive away: one factor moved between two degrees, or the microbatch."""
    table: dict[Configuration, list[Configuration]] = {}
    for one in found:
        table[one] = [
            other
            for other in found
            if other is not one
            and one.axis_order == other.axis_order
            and sum(a != b for a, b in zip(_degrees(one), _degrees(other), strict=True)) <= 2
            and (one.microbatch == other.microbatch or _degrees(one) == _degrees(other))
        ]
    return table


def _degrees(configuration: Configuration) -> tuple[int, ...]:
    degrees = configuration.degrees
    return (degrees.dp, degrees.tp, configuration.num_ranks, degrees.zero)


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the best state over the starts."""
    found = configurations(problem, _REACH)
    search = AcesoSearch(problem, limits, adjacent(found))
    starts = sorted(((item, search.balanced(item)) for item in found), key=lambda state: search.estimate(state).rank)
    first: dict[int, list[State]] = {}
    for state in starts:
        first.setdefault(state[0].num_ranks, []).append(state)
    chosen = [states[0] for states in first.values()]
    chosen += [state for state in starts if state not in chosen][: max(0, NUM_STARTS - len(chosen))]
    rule = rule_of(problem, _REACH)
    choices = []
    for index, state in enumerate(chosen):
        if index and limits.reached() is not None:
            break
        configuration, bounds = end = search.climb(state)
        estimate = search.estimate(end)
        partition = Partition(bounds, estimate.levels)
        choices.append(Choice(estimate.value, Candidate(configuration, rule, 1), partition))
        limits.report("starts", index + 1, len(chosen), None, None)
    return choices_outcome(problem, limits, choices, PLANNER.name)


_REACH = Reach(tensor=True, zero=(0, 1))

PLANNER = NamedPlanner(
    "aceso",
    "Liu et al., Aceso: Efficient Parallel DNN Training through Iterative Bottleneck Alleviation, EuroSys 2024",
    solve,
    objective="sum t + (B - 1) max t, seconds",
)
