"""The named schedules as starting orders: what the search returns is never worse than any of them.

Every plain family of as many replicas as the placements have is tried for each number of chunks, without a cap and, where it takes
one, under it. A family that improves its order for the costs takes most of its time for that, so it is first drawn up without
improvement. The most promising one is then generated in full, the others only when the search has found its best order (`Seeds.left`),
and a family is left out where that is proved to change nothing:

- its floor is not below the best order known. The floor is a bound on every order of its placement under the caps that counts a full
  backward as one action where the family does not split it, and holds the chunks that its construction allows. Where sizes alone
  fix the order of F and I, it is also a bound on that order: each rank from each of its actions on, W included;
- sizes alone fix its order of F and I, and that order is over the caps even with each W right behind its I.

Families whose orders are orders of another problem are no seeds, and `auto` may lose to them: activations moved to a peer or to the host
(bpipe, pipeoffload), slices, stage graphs, and asynchronous ones.

The later that is, the fewer floors are below the best order known. A family that is over the caps as it is drawn up could fit in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from stagewright.planner.errors import StagewrightError
from stagewright.planner.schedules import registry
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.auto.bound import lower_bound
from stagewright.planner.schedules.auto.instance import Instance, Ints
from stagewright.planner.schedules.auto.site import Site
from stagewright.planner.schedules.auto.sweep import end_times
from stagewright.planner.schedules.auto.word import fits, fused_makespan, words_of
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.schedule import KIND, REPLICA, STAGE, Schedule

IN_FULL = 1.0  # parameters["effort"] of a family when a user names it
APART = {"fused": 0}  # pairs of F and B run one after the other: without a table of overlaps that is never longer


@dataclass(frozen=True, eq=False)
class Seed:
    """A named order that fits: makespan as generated, makespan with every backward split, split words."""

    name: str
    named_s: float
    split_s: float
    words: Ints


class Choice(NamedTuple):
    """A family with the number of chunks and the memory cap that it is asked for."""

    family: ScheduleFamily
    chunks: int
    cap: float | None


class Seeds:
    """The seeds found so far, by site, and the choices left to be generated in full, the most promising first.

    `drawn` keeps the words that a family was last generated with, by family, chunks and the sites that have its placement.
    """

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.found: list[list[Seed]] = [[] for _ in sites]
        self.best_s = np.inf
        self.left: list[Choice] = []
        self.drawn: dict[tuple[str, int, int], Ints] = {}

    def collect(self, is_late: Callable[[], bool]) -> None:
        """Find the orders that keep the caps; `is_late` is asked before each family, and once it says so, the rest is left out."""
        left: list[tuple[float, Choice]] = []
        for choice in self._choices():
            if is_late():
                return
            improves = choice.family.improves
            fitting, can_fit = self._add(choice, 0.0 if improves else IN_FULL)
            if improves and (fitting or can_fit):
                left.append((min((seed.split_s for seed in fitting), default=np.inf), choice))
        self.left = [choice for _, choice in sorted(left, key=lambda pair: pair[0])]
        if self.left and not is_late():
            self.complete(self.left[0], self.best_s)

    def complete(self, choice: Choice, best_s: float) -> list[tuple[int, Seed]]:
        """Generate a choice that is left in full, unless its floor is at least `best_s`; return (site, seed) of those that fit."""
        if self._floor_s(choice.family, choice.chunks) >= best_s:
            return []
        self.left = [other for other in self.left if other is not choice]
        before = [len(seeds) for seeds in self.found]
        self._add(choice, IN_FULL)
        return [(site, seed) for site, seeds in enumerate(self.found) for seed in seeds[before[site] :]]

    def _choices(self) -> Iterator[Choice]:
        """Yield every plain family of the sites' copies without a cap and, where it takes one, with the least and largest cap."""
        caps, copies = self.sites[0].instance.cap, self.sites[0].instance.num_chains  # the same on every site
        given = sorted({float(caps.min()), float(caps.max())} - {np.inf})
        for chunks in sorted({site.num_chunks for site in self.sites}):
            for family in registry.families():
                if family.synchronous and family.plain and family.num_replicas == copies:
                    for cap in (*(given if family.takes_cap else ()), None):
                        yield Choice(family, chunks, cap)

    def _add(self, choice: Choice, effort: float) -> tuple[list[Seed], bool]:
        """Keep the orders that fit; return them, and whether more effort could make another one fit."""
        family, chunks = choice.family, choice.chunks
        same = [(index, site) for index, site in enumerate(self.sites) if site.num_chunks == chunks]
        schedule = _schedule(choice, same[0][1], effort)
        if schedule is None:
            return [], False
        fitting, can_fit = [], False
        for index, site in same:
            words = words_of(schedule, site.instance)
            if words is None:
                continue
            self.drawn[family.name, chunks, index] = words
            can_fit |= not family.fixed_order or fits(site.instance, _weights_at_once(site.instance, words))
            seed = _seed(family.name, schedule, words, site.instance)
            if seed is not None:
                self.found[index].append(seed)
                self.best_s = min(self.best_s, seed.split_s)
                fitting.append(seed)
        return fitting, can_fit

    def _floor_s(self, family: ScheduleFamily, chunks: int) -> float:
        """Return seconds that no order of the family undercuts, as it is named, on any site."""
        floors_s = [
            max(_floor_s(family, self.sites[index].instance), self._order_floor_s(family, index, words))
            for (name, drawn_chunks, index), words in self.drawn.items()
            if (name, drawn_chunks) == (family.name, chunks)
        ]
        return min(floors_s)

    def _order_floor_s(self, family: ScheduleFamily, site: int, words: Ints) -> float:
        return order_floor_s(self.sites[site].instance, words) if family.fixed_order else 0.0


def _floor_s(family: ScheduleFamily, instance: Instance) -> float:
    costs = instance.costs
    if not family.split_backward:
        costs = replace(
            costs,
            input_grad_s=costs.input_grad_s + costs.weight_grad_s,
            weight_grad_s=np.zeros(costs.num_stages),
            freed_at_input_grad=np.zeros(costs.num_stages),
        )
    floor_s = lower_bound(replace(instance, costs=costs), rounds=0)
    if family.held_chunks is None:
        return floor_s
    counted = replace(costs, activation=np.ones(costs.num_stages), freed_at_input_grad=np.zeros(costs.num_stages))
    held = np.full(instance.num_ranks, float(family.held_chunks(instance.num_ranks)))
    return max(floor_s, lower_bound(replace(instance, costs=counted, cap=held), rounds=0))


def _weights_at_once(instance: Instance, words: Ints) -> Ints:
    """Return the words with each W right behind its I, which holds least."""
    microbatches = instance.num_microbatches
    moved = words.copy()
    for rank, length in enumerate(instance.tables.lengths):
        word = words[rank, :length]
        kind = (word // microbatches) % 3
        kept = word[kind != 2]
        is_input_grad = (kept // microbatches) % 3 == 1
        counts = 1 + is_input_grad
        spread = np.repeat(kept, counts)
        spread[(np.cumsum(counts) - 1)[is_input_grad]] += microbatches
        moved[rank, :length] = spread
    return moved


def order_floor_s(instance: Instance, words: Ints) -> float:
    """Return seconds that no order with the same F and I on each rank undercuts, wherever its W run.

    Without W the order's starts are early enough; from the start of any F or I on, its rank still runs all later F and I
    and the W of all later I.
    """
    costs = instance.costs
    light = replace(instance, costs=replace(costs, weight_grad_s=np.zeros(costs.num_stages)))
    _, end_s = end_times(light, _weights_at_once(instance, words))
    floor_s = 0.0
    for rank, length in enumerate(instance.tables.lengths):
        word = words[rank, :length]
        letter = word // instance.num_microbatches
        kept, letter = word[letter % 3 != 2], letter[letter % 3 != 2]
        duration_s = light.tables.duration_s[letter]
        work_s = duration_s + np.where(letter % 3 == 1, instance.tables.duration_s[letter // 3 * 3 + 2], 0.0)
        start_s = end_s[kept] - duration_s
        floor_s = max(floor_s, float((start_s + np.cumsum(work_s[::-1])[::-1]).max()))
    return floor_s


def _schedule(choice: Choice, site: Site, effort: float) -> Schedule | None:
    """Return the family's schedule of this size, on the given placement if it can; None when it cannot have this size or cap."""
    instance = site.instance
    given = instance.placement[None, :] if site.name == "given" else None
    for placement in (given, None) if given is not None else (None,):
        request = ScheduleRequest(
            num_ranks=instance.num_ranks,
            num_microbatches=instance.num_chains * instance.num_microbatches,
            num_chunks=site.num_chunks,
            costs=site.costs,
            latency_s=instance.latency_s,
            memory_cap=choice.cap,
            placement=placement,
            parameters={"effort": effort, **APART},
        )
        try:
            return choice.family.generate(request)
        except StagewrightError:
            continue
    return None


def _seed(name: str, schedule: Schedule, words: Ints, instance: Instance) -> Seed | None:
    if not fits(instance, words):
        return None
    split_s, _ = end_times(instance, words)
    if not np.isfinite(split_s):
        return None
    return Seed(name, fused_makespan(instance, words, _fused_actions(schedule, instance)), split_s, words)


def _fused_actions(schedule: Schedule, instance: Instance) -> Ints:
    """Return the input-gradient actions that the schedule runs as part of a B."""
    microbatches = instance.num_microbatches
    counts = np.zeros(instance.num_stages, dtype=np.int32)
    actions: list[int] = []
    for order in schedule.orders:
        for kind, replica, place in order[:, [KIND, REPLICA, STAGE]].tolist():
            stage = replica * schedule.num_stages + place
            if kind in (Kind.B, Kind.I):
                if kind == Kind.B:
                    actions.append((3 * stage + 1) * microbatches + int(counts[stage]))
                counts[stage] += 1
    return np.array(actions, dtype=np.int32)
