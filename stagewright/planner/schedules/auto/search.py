"""The `auto` schedule: the best order found on any allowed placement, with a proved bound.

1. Every named order that fits the caps is split and becomes a starting order on its own placement, so the result is never
   worse than a named schedule.
2. Each placement gets its lower bound. Placements are visited in the order of their bounds; one whose bound is not
   below the best makespan cannot win and is skipped. A makespan that meets the least bound is optimal and ends the search.
3. The first half of the budget goes evenly to the placements: repeating blocks, list-decoder climbing, annealing. The
   second half anneals the placements that lead.

The budget is counted in evaluations, so equal requests give equal bytes; a deadline only stops earlier and is then named
in the result. No optimality beyond what the bound or the exact search of small instances proves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from stagewright.planner.schedules.auto.annealing import anneal
from stagewright.planner.schedules.auto.block import search_blocks
from stagewright.planner.schedules.auto.bound import lower_bound
from stagewright.planner.schedules.auto.climbing import climb_targets
from stagewright.planner.schedules.auto.instance import Instance
from stagewright.planner.schedules.auto.pool import Pool
from stagewright.planner.schedules.auto.request import AutoRequest, AutoResult, Gain, Stop
from stagewright.planner.schedules.auto.seed import Seed, seeds
from stagewright.planner.schedules.auto.site import Site, sites
from stagewright.planner.schedules.auto.word import schedule_of

Progress = Callable[[float, float], None]

TEMPERATURES = (0.1, 0.03, 0.2, 0.01)  # first temperatures in shares of the mean action
FIRST_SHARE = 0.5  # of the budget, spent evenly over placements
BLOCK_SHARE, CLIMB_SHARE = 0.25, 0.1  # of a placement's first visit
LEADERS = 2  # placements that get the rest of the budget


@dataclass(eq=False)
class _Visit:
    """A placement under search."""

    site: Site
    bound_s: float
    seeds: list[Seed]
    pool: Pool = field(default_factory=Pool)
    evaluations: int = 0
    runs: int = 0

    @property
    def instance(self) -> Instance:
        return self.site.instance

    @property
    def solved(self) -> bool:
        return self.pool.best_s <= self.bound_s + self.instance.time_slack_s


class _Search:
    """Spends the budget; one object for one call of `search`."""

    def __init__(self, request: AutoRequest, progress: Progress | None, deadline_s: float | None) -> None:
        self.request = request
        self.progress = progress
        self.ends_at = None if deadline_s is None else time.monotonic() + deadline_s
        self.visits = [_open(site) for site in sites(request)]
        self.visits.sort(key=lambda visit: (visit.bound_s, visit.pool.best_s))

    @property
    def best(self) -> _Visit:
        return min(self.visits, key=lambda visit: visit.pool.best_s)

    @property
    def bound_s(self) -> float:
        return min(visit.bound_s for visit in self.visits)

    @property
    def solved(self) -> bool:
        best = self.best
        return best.pool.best_s <= self.bound_s + best.instance.time_slack_s

    @property
    def late(self) -> bool:
        return self.ends_at is not None and time.monotonic() >= self.ends_at

    def open_visits(self) -> list[_Visit]:
        """Return the placements that could still win, best bound first."""
        best = self.best
        limit_s = best.pool.best_s - best.instance.time_slack_s
        return [visit for visit in self.visits if not visit.solved and visit.bound_s < limit_s]

    def run(self) -> Stop:
        """Spend the budget and return why it ended."""
        first = int(self.request.budget * FIRST_SHARE)
        visits = self.open_visits()
        for visit in visits:
            if visit in self.open_visits():
                self._first_visit(visit, first // len(visits))
        rest = self.request.budget - first
        rounds = len(TEMPERATURES)
        for _ in range(rounds):
            leaders = sorted(self.open_visits(), key=lambda visit: visit.pool.best_s)[:LEADERS]
            for visit in leaders:
                self._anneal(visit, rest // (rounds * len(leaders)))
        if self.solved:
            return Stop.OPTIMAL
        return Stop.DEADLINE if self.late else Stop.BUDGET

    def _first_visit(self, visit: _Visit, budget: int) -> None:
        instance = visit.instance
        seed = self.request.seed
        if not self.late:
            blocks = int(budget * BLOCK_SHARE) // _moves_per_order(instance, 80)
            visit.pool.add(*search_blocks(instance, evaluations=blocks, seed=seed))
            visit.evaluations += blocks
        if not self.late:
            climbs = int(budget * CLIMB_SHARE) // _moves_per_order(instance, 8)
            visit.pool.add(*climb_targets(instance, evaluations=climbs, seed=seed))
            visit.evaluations += climbs
        rest = budget - int(budget * BLOCK_SHARE) - int(budget * CLIMB_SHARE)
        for _ in range(2):
            self._anneal(visit, rest // 2)

    def _anneal(self, visit: _Visit, moves: int) -> None:
        """Anneal from an order of the pool, the temperatures in turn."""
        if self.late or visit.solved or not visit.pool.orders:
            return
        instance = visit.instance
        start = visit.runs // len(TEMPERATURES) % len(visit.pool.orders)
        share = TEMPERATURES[visit.runs % len(TEMPERATURES)]
        makespan_s, words, made = anneal(
            instance,
            visit.pool.orders[start][1],
            moves=moves,
            temperature_s=share * float(instance.tables.duration_s.mean()),
            bound_s=visit.bound_s,
            seed=self.request.seed + visit.runs,
        )
        visit.runs += 1
        visit.evaluations += made
        visit.pool.add(makespan_s, words)
        if self.progress is not None:
            self.progress(self.best.pool.best_s, self.bound_s)


def search(request: AutoRequest, *, progress: Progress | None = None, deadline_s: float | None = None) -> AutoResult:
    """Return the best order found within the request's budget.

    Parameters
    ----------
    progress : called with the best makespan and the bound, seconds, after each run.
    deadline_s : seconds after which no further run is started.

    Raises Infeasible, with the smallest cap that works, when one microbatch exceeds the cap on every placement.
    """
    request.check()
    state = _Search(request, progress, deadline_s)
    stop = state.run()
    best = state.best
    instance = best.instance
    words = best.pool.best_words
    return AutoResult(
        schedule=schedule_of(instance, words),
        costs=instance.costs,
        placement=best.site.name,
        num_chunks=best.site.num_chunks,
        makespan_s=best.pool.best_s,
        bound_s=min(state.bound_s, best.pool.best_s),
        evaluations=sum(visit.evaluations for visit in state.visits),
        stop=stop,
        gain=_gain([seed for visit in state.visits for seed in visit.seeds], best.pool.best_s),
    )


def _open(site: Site) -> _Visit:
    visit = _Visit(site, lower_bound(site.instance), seeds(site))
    for seed in visit.seeds:
        visit.pool.add(seed.split_s, seed.words)
    if not visit.pool.orders:
        visit.pool.add(*climb_targets(site.instance, evaluations=2, seed=0))
    return visit


def _gain(found: list[Seed], found_s: float) -> Gain | None:
    if not found:
        return None
    named = min(found, key=lambda seed: seed.named_s)
    return Gain(named.name, named.named_s, min(seed.split_s for seed in found), found_s)


def _moves_per_order(instance: Instance, actions_per_move: int) -> int:
    """Return how many annealing moves cost as much as one order made by a slower method."""
    return max(1, int(np.ceil(instance.num_actions / actions_per_move)))
