"""The `auto` schedule: the best order found on any allowed placement, with a proved bound.

1. Every named order that fits the caps is split and becomes a starting order on its own placement, so the result is never
   worse than a named schedule (see `seed` for which). Those that take long to make wait until step 4 is done.
2. Each placement gets its lower bound; one whose bound is not below the best makespan cannot win and is skipped. A
   makespan that meets the least bound is optimal and ends the search.
3. A first share of the budget goes evenly to the placements: repeating blocks, list-decoder climbing, and annealing from
   what each of them found and from the best named order. Their lines stay apart: a named order is often a local optimum
   that annealing does not leave, while a worse order of another kind leads below it.
4. Small placements are then searched exactly, within a number of nodes; most instances with at most 12 actions on a rank
   are closed in one.
5. Most of the budget anneals the placements that lead, from the best orders found so far.
6. What is left raises the bounds of the placements that still could have a shorter order.
7. Where the request allows two copies of the weights, the same steps follow for two copies in opposite directions, whose bound must be below
   the best makespan of one copy; they have a quarter of the budget on top, so that one copy's answer does not depend on them.

The budget is counted in evaluations, so equal requests give equal bytes; a deadline only stops earlier and is then named
in the result. No optimality beyond what the bounds and the exact search prove.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from stagewright.planner.schedules.auto.annealing import anneal
from stagewright.planner.schedules.auto.block import search_blocks
from stagewright.planner.schedules.auto.bound import lower_bound
from stagewright.planner.schedules.auto.branching import improve_exactly, raise_bound
from stagewright.planner.schedules.auto.climbing import climb_targets
from stagewright.planner.schedules.auto.instance import Instance, Ints
from stagewright.planner.schedules.auto.request import AutoRequest, AutoResult, Gain, OneCopy, Stop
from stagewright.planner.schedules.auto.seed import Seed, Seeds
from stagewright.planner.schedules.auto.site import Site, bidirectional_site, sites
from stagewright.planner.schedules.auto.word import schedule_of

Progress = Callable[[float, float], None]

TEMPERATURES = (0.6, 0.3)  # first temperatures in shares of the mean action, run by run
ACTIONS_PER_MOVE = 1000  # in an instance of so many actions a move costs twice what it costs in a tiny one
WARM_MOVES = 80  # for each action; a run of fewer moves starts colder in proportion
FIRST_SHARE, EXACT_SHARE, BOUND_SHARE = 0.35, 0.1, 0.05  # of the budget; leaders anneal with the rest
COPIES_SHARE = 0.25  # of the budget, on top of it, for two copies
BLOCK_SHARE, CLIMB_SHARE = 0.35, 0.1  # of a placement's first visit
MOST_BEHIND = 1.2  # a line longer than the placement's best one by this factor is not annealed
LEADERS = 2
ROUNDS = 4  # annealing runs of each leader
EXACT_ACTIONS = 12  # on a rank; up to this size the exact search goes on until it ends
MOST_EXACT_NODES = 200_000  # of an instance of that size, at normal effort and above
LEAST_EXACT_NODES = 20_000
EVALUATIONS_PER_NODE = 25  # of the budget, between the two
ACTION_PAIRS_PER_MOVE = 15  # of a rank, looked at by the exact search in the time of an annealing move
LEAST_NODES = 20  # fewer are not worth a start
LEAST_PROBES, MOST_PROBES = 3, 8  # of one bisection of a bound
PROBE_NODES = 5  # nodes that cost as much as one probe of the bound


@dataclass(eq=False)
class _Visit:
    """A placement under search."""

    site: Site
    bound_s: float
    lines: list[tuple[float, Ints]] = field(default_factory=list)  # the best order that came from each start
    evaluations: int = 0
    runs: int = 0

    @property
    def instance(self) -> Instance:
        return self.site.instance

    @property
    def best_s(self) -> float:
        return min(makespan_s for makespan_s, _ in self.lines)

    @property
    def best_words(self) -> Ints:
        return min(self.lines, key=lambda line: line[0])[1]

    @property
    def solved(self) -> bool:
        return self.best_s <= self.bound_s + self.instance.time_slack_s

    def start_line(self, makespan_s: float, words: Ints) -> None:
        """Take in an order that owes nothing to the others, if it is one."""
        if np.isfinite(makespan_s):
            self.lines.append((makespan_s, words.copy()))

    def promising(self) -> list[int]:
        """Return the lines that are worth annealing, the best first."""
        found = [line for line, (makespan_s, _) in enumerate(self.lines) if makespan_s <= MOST_BEHIND * self.best_s]
        return sorted(found, key=lambda line: self.lines[line][0])


class _Search:
    """Spends a budget on placements with as many copies of the weights each; only orders below `known_s` are of interest."""

    def __init__(
        self,
        request: AutoRequest,
        allowed: list[Site],
        *,
        budget: int,
        progress: Progress | None,
        ends_at: float | None,
        known_s: float = np.inf,
    ) -> None:
        self.seed = request.seed
        self.budget = budget
        self.progress = progress
        self.ends_at = ends_at
        self.known_s = known_s
        self.seeds = Seeds(allowed)
        self.seeds.collect(self.is_late)
        self.sites = [_open(site, found, known_s) for site, found in zip(allowed, self.seeds.found, strict=True)]
        self.visits = sorted(self.sites, key=lambda visit: (visit.bound_s, visit.best_s))

    @property
    def best(self) -> _Visit:
        return min(self.visits, key=lambda visit: visit.best_s)

    @property
    def best_s(self) -> float:
        return min(self.best.best_s, self.known_s)

    @property
    def bound_s(self) -> float:
        return min(visit.bound_s for visit in self.visits)

    @property
    def solved(self) -> bool:
        return self.best_s <= self.bound_s + self.best.instance.time_slack_s

    @property
    def evaluations(self) -> int:
        return sum(visit.evaluations for visit in self.visits)

    def is_late(self) -> bool:
        return self.ends_at is not None and time.monotonic() >= self.ends_at

    def is_open(self, visit: _Visit) -> bool:
        """Return whether the placement could still have a shorter order than the best one."""
        return not visit.solved and visit.bound_s < self.best_s - self.best.instance.time_slack_s

    def run(self) -> Stop:
        """Spend the budget and return why it ended."""
        budget = self.budget
        candidates = [visit for visit in self.visits if self.is_open(visit)]
        for visit in candidates:
            if self.is_open(visit):
                self._first_visit(visit, int(budget * FIRST_SHARE) // len(candidates))
        for visit in self.visits:
            self._solve_exactly(visit, int(budget * EXACT_SHARE) // len(self.visits))
        self._complete_seeds()
        rest = int(budget * (1.0 - FIRST_SHARE - EXACT_SHARE - BOUND_SHARE))
        for turn in range(ROUNDS):
            leaders = sorted((v for v in self.visits if self.is_open(v)), key=lambda visit: visit.best_s)[:LEADERS]
            for visit in leaders:
                lines = visit.promising()
                # The best line every other time, the others in between.
                line = lines[(turn + 1) // 2 % len(lines)] if turn % 2 else lines[0]
                self._anneal(visit, line, rest // (ROUNDS * len(leaders)))
        self._raise_bounds(int(budget * BOUND_SHARE))
        if self.solved:
            return Stop.OPTIMAL
        return Stop.DEADLINE if self.is_late() else Stop.BUDGET

    def _first_visit(self, visit: _Visit, budget: int) -> None:
        instance = visit.instance
        seed = self.seed
        blocks = int(budget * BLOCK_SHARE)
        if blocks and not self.is_late():
            visit.start_line(*search_blocks(instance, moves=blocks, seed=seed))
            visit.evaluations += blocks
        climbs = int(budget * CLIMB_SHARE) // _moves_per_order(instance, 8)
        if climbs and not self.is_late():
            visit.start_line(*climb_targets(instance, evaluations=climbs, seed=seed))
            visit.evaluations += climbs
        rest = budget - int(budget * BLOCK_SHARE) - int(budget * CLIMB_SHARE)
        lines = visit.promising()
        for line in lines:
            self._anneal(visit, line, rest // len(lines))

    def _anneal(self, visit: _Visit, line: int, budget: int) -> None:
        """Anneal one line of the placement, the temperatures in turn."""
        if self.is_late() or not self.is_open(visit):
            return
        instance = visit.instance
        moves = int(budget / (1.0 + instance.num_actions / ACTIONS_PER_MOVE))
        share = TEMPERATURES[visit.runs % len(TEMPERATURES)] * min(1.0, moves / (WARM_MOVES * instance.num_actions))
        makespan_s, words, made = anneal(
            instance,
            visit.lines[line][1],
            moves=moves,
            temperature_s=share * float(instance.tables.duration_s.mean()),
            bound_s=visit.bound_s,
            seed=self.seed + visit.runs,
        )
        visit.runs += 1
        visit.evaluations += made
        visit.lines[line] = (makespan_s, words)
        self._report()

    def _solve_exactly(self, visit: _Visit, budget: int) -> None:
        """Look for an order below the best of all placements; when there is none, this placement is closed."""
        if self.is_late() or not self.is_open(visit):
            return
        nodes = budget // _moves_per_node(visit.instance)
        if int(visit.instance.tables.lengths.max()) <= EXACT_ACTIONS:
            nodes = min(max(LEAST_EXACT_NODES, self.budget // EVALUATIONS_PER_NODE), MOST_EXACT_NODES)
        if nodes < LEAST_NODES:
            return
        verdict = improve_exactly(visit.instance, self.best_s, nodes=nodes)
        visit.evaluations += verdict.nodes
        if verdict.words is not None:
            visit.start_line(verdict.makespan_s, verdict.words)
        if verdict.proved:
            visit.bound_s = max(visit.bound_s, verdict.makespan_s)
        self._report()

    def _complete_seeds(self) -> None:
        """Generate the families that were put off, where one of them could still beat the best order."""
        for choice in self.seeds.left:
            if self.is_late() or self.solved:
                return
            for site, seed in self.seeds.complete(choice, self.best_s):
                self.sites[site].start_line(seed.split_s, seed.words)

    def named(self, known_s: float) -> list[Seed]:
        """Return the named orders that fit, after generating those that could be below `known_s` and below all others."""
        for choice in self.seeds.left:
            if self.is_late():
                break
            self.seeds.complete(choice, min([known_s, *(seed.named_s for seed in self._named())]))
        return self._named()

    def _named(self) -> list[Seed]:
        return [seed for found in self.seeds.found for seed in found]

    def _raise_bounds(self, budget: int) -> None:
        """Raise the bound of the open placement that has the lowest one, as long as that succeeds: only the lowest counts."""
        left = budget
        while not self.is_late():
            visit = min((visit for visit in self.visits if self.is_open(visit)), key=lambda v: v.bound_s, default=None)
            if visit is None:
                return
            cost = PROBE_NODES * _moves_per_node(visit.instance)
            probes = min(MOST_PROBES, left // cost)
            if probes < LEAST_PROBES:
                return
            left -= probes * cost
            before_s = visit.bound_s
            visit.bound_s = raise_bound(visit.instance, before_s, self.best_s, probes=probes)
            self._report()
            if visit.bound_s <= before_s + visit.instance.time_slack_s:
                return

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.best_s, self.bound_s)


def search(request: AutoRequest, *, progress: Progress | None = None, deadline_s: float | None = None) -> AutoResult:
    """Return the best order found within the request's budget.

    Parameters
    ----------
    progress : called with the best makespan and the bound, seconds, after each run.
    deadline_s : seconds after which no further run is started.

    Raises Infeasible, with the smallest cap that works, when one microbatch exceeds the cap on every placement.
    """
    request.check()
    ends_at = None if deadline_s is None else time.monotonic() + deadline_s
    single = _Search(request, sites(request), budget=request.budget, progress=progress, ends_at=ends_at)
    stop = single.run()
    searches, best = [single], single.best
    both_ways = bidirectional_site(request)
    if both_ways is not None:
        budget = int(request.budget * COPIES_SHARE)
        known_s = single.best_s
        double = _Search(request, [both_ways], budget=budget, progress=None, ends_at=ends_at, known_s=known_s)
        double_stop = double.run()
        searches.append(double)
        if double.best.best_s < known_s - double.best.instance.time_slack_s:
            best = double.best
        stop = _joined(stop, double_stop, min(search.bound_s for search in searches), best)
    instance = best.instance
    return AutoResult(
        schedule=schedule_of(instance, best.best_words),
        costs=best.site.costs,
        placement=best.site.name,
        num_chunks=best.site.num_chunks,
        num_copies=instance.num_chains,
        one_copy=OneCopy(single.best_s, min(single.bound_s, single.best_s)),
        makespan_s=best.best_s,
        bound_s=min(best.best_s, *(search.bound_s for search in searches)),
        evaluations=sum(search.evaluations for search in searches),
        stop=stop,
        gain=_gain(searches, best.best_s),
    )


def _joined(one: Stop, other: Stop, bound_s: float, best: _Visit) -> Stop:
    """Return why two searches ended that both looked for less than the best order."""
    if best.best_s <= bound_s + best.instance.time_slack_s:
        return Stop.OPTIMAL
    return Stop.DEADLINE if Stop.DEADLINE in (one, other) else Stop.BUDGET


def _gain(searches: list[_Search], found_s: float) -> Gain | None:
    """Return what was won over the named schedules."""
    named: list[Seed] = []
    for search in searches:
        named += search.named(min((seed.named_s for seed in named), default=np.inf))
    if not named:
        return None
    best = min(named, key=lambda seed: seed.named_s)
    return Gain(best.name, best.named_s, min(seed.split_s for seed in named), found_s)


def _open(site: Site, found: list[Seed], known_s: float) -> _Visit:
    bound_s = lower_bound(site.instance, rounds=0) if np.isfinite(known_s) else -np.inf
    visit = _Visit(site, bound_s if bound_s >= known_s else lower_bound(site.instance))
    if found:
        best = min(found, key=lambda seed: (seed.split_s, seed.named_s))
        visit.start_line(best.split_s, best.words)
    else:
        visit.start_line(*climb_targets(site.instance, evaluations=2, seed=0))
    return visit


def _moves_per_order(instance: Instance, actions_per_move: int) -> int:
    """Return how many annealing moves cost as much as one order made by a slower method."""
    return max(1, int(np.ceil(instance.num_actions / actions_per_move)))


def _moves_per_node(instance: Instance) -> int:
    """Return how many annealing moves cost as much as one node of the exact search, quadratic in a rank's actions."""
    return max(1, int(instance.num_ranks * float(instance.tables.lengths.max()) ** 2 / ACTION_PAIRS_PER_MOVE))
