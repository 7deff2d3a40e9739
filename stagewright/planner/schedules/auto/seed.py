"""The named schedules on a placement, as starting orders: what the search returns is never worse than any of them."""

from __future__ import annotations

from collections.abc import Iterator
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


@dataclass(frozen=True, eq=False)
class Seed:
    """A named order that fits: makespan as generated, makespan with every backward split, split words."""

    name: str
    named_s: float
    split_s: float
    words: Ints


def seeds(site: Site) -> list[Seed]:
    """Return every named order of the site's placement that keeps the caps, best split makespan first."""
    found = [
        seed
        for family in registry.families()
        if family.synchronous and family.num_replicas == 1
        for schedule in _schedules(family, site)
        if (seed := _seed(family.name, schedule, site.instance)) is not None
    ]
    return sorted(found, key=lambda seed: (seed.split_s, seed.named_s, seed.name))


def _schedules(family: ScheduleFamily, site: Site) -> Iterator[Schedule]:
    """Yield the family's schedules without a cap and, where there is one, with the tightest rank's cap."""
    instance = site.instance
    caps: list[float | None] = [None]
    if np.isfinite(instance.cap).any():
        caps.append(float((instance.cap / np.maximum(instance.microbatch_memory, 1e-300)).min()))
    for cap in caps:
        for waves in {None, site.num_chunks // 2 or None}:
            request = ScheduleRequest(
                num_ranks=instance.num_ranks,
                num_microbatches=instance.num_microbatches,
                num_chunks=site.num_chunks,
                num_waves=waves,
                costs=instance.costs,
                latency_s=instance.latency_s,
                memory_cap=cap,
            )
            try:
                yield family.generate(request)
            except StagewrightError:
                # These sizes or this cap are not the family's.
                continue


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
