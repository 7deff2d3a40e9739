"""The seeds: no named order that keeps the caps is left out unless a floor proves that it cannot matter."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import StagewrightError
from stagewright.planner.schedules import registry
from stagewright.planner.schedules.auto import AutoRequest, search
from stagewright.planner.schedules.auto.seed import Choice, Seeds, order_floor_s
from stagewright.planner.schedules.auto.site import sites
from stagewright.planner.schedules.auto.sweep import end_times
from stagewright.planner.schedules.auto.word import fits, words_of
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest

SINGLE = [family for family in registry.families() if family.synchronous and family.plain and family.num_replicas == 1]


def _request(seed: int, *, cap: float) -> AutoRequest:
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(2, 7))
    layers = 4 * ranks
    return AutoRequest(
        ranks,
        int(rng.integers(2, 4 * ranks + 1)),
        StageCosts.of(*rng.uniform(0.1, 0.4, (3, layers)), activation=rng.uniform(0.1, 0.4, layers)),
        latency_s=float(rng.choice([0.0, 0.2])),
        memory_cap=max(1.7, cap * ranks),
        evaluations=20_000,
    )


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (0, 3, 4, 5))])
def test_a_named_order_that_fits_is_found_or_has_a_floor_above_the_best(seed):
    request = _request(seed, cap=[0.4, 0.55, 0.75, 1.0][seed % 4])
    allowed = sites(request)
    seeds = Seeds(allowed)
    seeds.collect(lambda: False)
    for choice in seeds.left:
        seeds.complete(choice, np.inf)
    for index, site in enumerate(allowed):
        names = {seed.name for seed in seeds.found[index]}
        for family in SINGLE:
            for memory_cap in (None, request.memory_cap) if family.takes_cap else (None,):
                named = ScheduleRequest(
                    request.num_ranks,
                    request.num_microbatches,
                    num_chunks=site.num_chunks,
                    costs=site.instance.costs,
                    latency_s=request.latency_s,
                    memory_cap=memory_cap,
                )
                try:
                    words = words_of(family.generate(named), site.instance)
                except StagewrightError:
                    continue
                if words is None or not fits(site.instance, words):
                    continue
                makespan_s = end_times(site.instance, words)[0]
                assert family.name in names or makespan_s >= seeds.best_s * (1 - 1e-9), (family.name, site.name)


@pytest.mark.parametrize("name", [family.name for family in SINGLE if family.fixed_order])
@pytest.mark.parametrize("seed", range(5))
def test_the_floor_of_a_fixed_order_holds_wherever_its_w_run(name, seed):
    request = _request(seed, cap=8.0)
    family = registry.family(name)
    for site in sites(request):
        drawn = {}
        for effort in (0.0, 1.0):
            named = ScheduleRequest(
                request.num_ranks,
                request.num_microbatches,
                num_chunks=site.num_chunks,
                costs=site.instance.costs,
                latency_s=request.latency_s,
                parameters={"effort": effort},
            )
            try:
                drawn[effort] = words_of(family.generate(named), site.instance)
            except StagewrightError:
                break
        if len(drawn) < 2 or drawn[0.0] is None or drawn[1.0] is None:
            continue
        floor_s = order_floor_s(site.instance, drawn[0.0])
        assert floor_s == pytest.approx(order_floor_s(site.instance, drawn[1.0]))
        assert floor_s <= end_times(site.instance, drawn[1.0])[0] * (1 + 1e-9)


@pytest.mark.parametrize("family", [family for family in SINGLE if not family.takes_cap], ids=lambda row: row.name)
def test_a_family_that_takes_no_cap_looks_away_from_it(family):
    orders = []
    for memory_cap in (None, 2.0):
        try:
            orders.append(family.generate(ScheduleRequest(4, 8, memory_cap=memory_cap, parameters={"effort": 0.1})))
        except StagewrightError:
            return
    assert all(np.array_equal(one, other) for one, other in zip(*(each.orders for each in orders), strict=True))


def test_an_order_over_the_cap_as_drawn_that_fits_in_full_is_a_seed_in_the_end():
    for index in range(34, 60):
        request = _request(index, cap=0.55)
        seeds = Seeds(sites(request))
        seeds.collect(lambda: False)
        found = [seed for choice in seeds.left for _, seed in seeds.complete(choice, np.inf)]
        if found:
            assert search(request).makespan_s <= min(seed.named_s for seed in found) * (1 + 1e-9)
            return
    raise AssertionError("no family of the sample fits only in full; take other samples")


def test_choices_hold_each_cap_once():
    request = _request(1, cap=1.0)
    choices = list(Seeds(sites(request))._choices())
    assert len(choices) == len(set(choices))
    assert all(choice.cap is None or choice.family.takes_cap for choice in choices)
    assert Choice(registry.family("zb-auto"), 1, request.memory_cap) in choices
