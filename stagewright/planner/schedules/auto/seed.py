"""The named schedules as starting orders: what the search returns is never worse than any of them.

Every family that fits the placements is tried for each number of chunks, with the cap when it can use one. Fixed orders come first
and cost little. A family that improves its order for the costs is drawn up without improvement; only then, the most promising
first, it is generated in full, and only where it could still matter. It is left out

- when its floor, a bound on every order of its placement under the caps, is not below the best order known. The floor counts a
  full backward as one action where the family does not split it, and holds the chunks that its construction allows;
- when the order it is drawn up with is over the caps on every placement: improvement fills memory, it does not save any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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
from stagewright.planner.schedules.schedule import KIND, STAGE, Schedule

IN_FULL = 1.0  # parameters["effort"] of a family when a user names it


@dataclass(frozen=True, eq=False)
class Seed:
    """A named order that fits: makespan as generated, makespan with every backward split, split words."""

    name: str
    named_s: float
    split_s: float
    words: Ints


class _Seeds:
    """The seeds found so far, by site."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.found: list[list[Seed]] = [[] for _ in sites]
        self.best_s = np.inf

    def add(self, family: ScheduleFamily, chunks: int, effort: float) -> list[Seed]:
        """Generate the family's orders of this number of chunks, keep and return those that fit."""
        same = [(index, site) for index, site in enumerate(self.sites) if site.num_chunks == chunks]
        kept = []
        for schedule in _schedules(family, same[0][1], effort):
            for index, site in same:
                seed = _seed(family.name, schedule, site.instance)
                if seed is not None:
                    self.found[index].append(seed)
                    self.best_s = min(self.best_s, seed.split_s)
                    kept.append(seed)
        return kept

    def floor_s(self, family: ScheduleFamily, chunks: int) -> float:
        """Return seconds that no order of the family undercuts, as it is named, on any site."""
        return min(_floor_s(family, site.instance) for site in self.sites if site.num_chunks == chunks)


def seeds(sites: list[Site], *, is_late: Callable[[], bool]) -> list[list[Seed]]:
    """Return named orders of each site that keep its caps, best split makespan first; no named order beats the best of them.

    `is_late` is asked before each family; once it says so, what was found so far is returned.
    """
    collected = _Seeds(sites)
    choices = [
        (family, chunks)
        for chunks in sorted({site.num_chunks for site in sites})
        for family in registry.families()
        if family.synchronous and family.num_replicas == 1
    ]
    promising: list[tuple[float, ScheduleFamily, int]] = []
    for family, chunks in choices:
        if is_late():
            break
        drawn = collected.add(family, chunks, 0.0 if family.improves else IN_FULL)
        if family.improves and drawn:
            promising.append((min(seed.split_s for seed in drawn), family, chunks))
    for _, family, chunks in sorted(promising, key=lambda choice: choice[0]):
        if is_late():
            break
        if collected.floor_s(family, chunks) < collected.best_s:
            collected.add(family, chunks, IN_FULL)
    return [sorted(found, key=lambda seed: (seed.split_s, seed.named_s)) for found in collected.found]


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


def _schedules(family: ScheduleFamily, site: Site, effort: float) -> Iterator[Schedule]:
    """Yield the family's schedule of this size: under the tightest cap where the family can meet it, else without."""
    instance = site.instance
    caps: list[float | None] = [None]
    held = instance.microbatch_memory
    if np.isfinite(instance.cap).any() and (held > 0.0).all():
        caps.insert(0, float((instance.cap / held).min()))
    given = instance.placement[None, :] if site.name == "given" else None
    for placement in (given, None) if given is not None else (None,):
        for cap in caps:
            request = ScheduleRequest(
                num_ranks=instance.num_ranks,
                num_microbatches=instance.num_microbatches,
                num_chunks=site.num_chunks,
                costs=instance.costs,
                latency_s=instance.latency_s,
                memory_cap=cap,
                placement=placement,
                parameters={"effort": effort},
            )
            try:
                yield family.generate(request)
            except StagewrightError:
                # These sizes, this placement or this cap are not the family's.
                continue
            return


def _seed(name: str, schedule: Schedule, instance: Instance) -> Seed | None:
    words = words_of(schedule, instance)
    if words is None or not fits(instance, words):
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
        for kind, stage in order[:, [KIND, STAGE]].tolist():
            if kind in (Kind.B, Kind.I):
                if kind == Kind.B:
                    actions.append((3 * stage + 1) * microbatches + int(counts[stage]))
                counts[stage] += 1
    return np.array(actions, dtype=np.int32)
