"""The named schedules as starting orders: what the search returns is never worse than any of them.

Each family is generated once for each number of chunks, with the cap when it can use one, and its orders start the search on the
placement that they assume. Tessel is left out: its generator is itself a search over periods, slower than this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from stagewright.planner.errors import StagewrightError
from stagewright.planner.schedules import registry
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.auto.instance import Instance, Ints
from stagewright.planner.schedules.auto.site import Site
from stagewright.planner.schedules.auto.sweep import end_times
from stagewright.planner.schedules.auto.word import fits, fused_makespan, words_of
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.schedule import KIND, STAGE, Schedule

SEARCHES = frozenset({"tessel"})  # families that are searches themselves


@dataclass(frozen=True, eq=False)
class Seed:
    """A named order that fits: makespan as generated, makespan with every backward split, split words."""

    name: str
    named_s: float
    split_s: float
    words: Ints


def seeds(sites: list[Site], *, is_late: Callable[[], bool]) -> list[list[Seed]]:
    """Return, for each site, every named order of its placement that keeps the caps, best split makespan first.

    `is_late` is asked before each family; once it says so, what was found so far is returned.
    """
    found: list[list[Seed]] = [[] for _ in sites]
    families = [
        family
        for family in registry.families()
        if family.synchronous and family.num_replicas == 1 and family.name not in SEARCHES
    ]
    for chunks in sorted({site.num_chunks for site in sites}):
        same = [(index, site) for index, site in enumerate(sites) if site.num_chunks == chunks]
        for family in families:
            if is_late():
                break
            for schedule in _schedules(family, same[0][1]):
                for index, site in same:
                    seed = _seed(family.name, schedule, site.instance)
                    if seed is not None:
                        found[index].append(seed)
    return [sorted(site_seeds, key=lambda seed: (seed.split_s, seed.named_s)) for site_seeds in found]


def _schedules(family: ScheduleFamily, site: Site) -> Iterator[Schedule]:
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
