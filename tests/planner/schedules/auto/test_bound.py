"""The bound is never above the best order, and meets it where the mathematics says so."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import StagewrightError
from stagewright.planner.schedules import registry
from stagewright.planner.schedules.auto.bound import any_order_bound, lower_bound
from stagewright.planner.schedules.auto.instance import make_instance
from stagewright.planner.schedules.auto.precedence import layout_of, root_node, tighten
from stagewright.planner.schedules.auto.sweep import end_times
from stagewright.planner.schedules.auto.word import words_of
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.schedules.schedule import loop_placement, wave_placement
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate

SMALL = [(2, 2, 1), (2, 3, 1), (3, 2, 1), (3, 3, 1), (4, 2, 1), (2, 1, 2), (3, 1, 2), (2, 1, 3), (2, 4, 1)]
FOREIGN = {"dhelix", "pipefisher"}  # pairs of F and B, and filler actions
NAMED = [row.name for row in registry.families() if row.synchronous and row.plain and row.name not in FOREIGN]


@pytest.mark.parametrize("seed", [*range(18), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(18, 36))])
def test_bound_is_never_above_the_best_of_all_orders(seed, random_instance, brute_force):
    rng = np.random.default_rng(seed)
    ranks, microbatches, chunks = SMALL[seed % len(SMALL)]
    instance = random_instance(rng, ranks, microbatches, chunks, whole=seed % 2 == 0)
    best_s = brute_force(instance)
    assert np.isfinite(best_s)
    assert lower_bound(instance) <= best_s * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(100, 112))
def test_bound_of_two_copies_is_never_above_the_best_of_all_orders(seed, random_instance, brute_force):
    ranks, microbatches = [(2, 2), (3, 2), (4, 2)][seed % 3]
    instance = random_instance(np.random.default_rng(seed), ranks, microbatches, whole=seed % 2 == 0, both_ways=True)
    best_s = brute_force(instance)
    assert np.isfinite(best_s)
    assert 0.6 * best_s < lower_bound(instance) <= best_s * (1 + 1e-9)


def test_bound_of_one_chunk_without_cap_is_met_by_zero_bubble_orders():
    # ZB-H2 of the published tables: 8 ranks, 16 microbatches, F/I/W/latency 10/12/8/1 ends at 557.
    costs = StageCosts.uniform(8, forward_s=10, input_grad_s=12, weight_grad_s=8)
    bound_s = any_order_bound(costs, loop_placement(8), num_ranks=8, num_microbatches=16, latency_s=1.0)
    assert bound_s == pytest.approx(557.0)


@pytest.mark.parametrize(("cap", "least"), [(2, 349.0), (3, 293.0)])
def test_bound_stays_below_known_optima_under_tight_caps(cap, least):
    costs = StageCosts.uniform(8, forward_s=10, input_grad_s=12, weight_grad_s=8, num_chunks=2)
    bound_s = any_order_bound(
        costs, wave_placement(4, 2), num_ranks=4, num_microbatches=8, latency_s=1.0, memory_cap=cap
    )
    assert 0.9 * least < bound_s <= least


def check_named_order(name: str, seed: int) -> bool:
    """Hold the bound, and what tightening derives, against a named order whose own peaks are the caps; False where it has none."""
    rng = np.random.default_rng(seed)
    family = registry.family(name)
    ranks, chunks = int(rng.integers(2, 5)), int(rng.choice([family.default_chunks, 1, 2, 3]))
    costs = StageCosts.of(*rng.uniform(0.5, 1.5, (3, ranks * chunks)), activation=rng.uniform(0.5, 1.5, ranks * chunks))
    latency_s = float(rng.choice([0.0, 0.3, 2.0]))
    request = ScheduleRequest(
        ranks,
        family.num_replicas * int(rng.integers(1, 9)),
        num_chunks=chunks,
        costs=costs,
        latency_s=latency_s,
        parameters={"effort": 0.0, "fused": 0},
    )
    try:
        schedule = family.generate(request)
    except StagewrightError:
        return False
    is_same_work = schedule.num_stages == ranks * chunks and schedule.num_microbatches == request.num_microbatches
    if not is_same_work or schedule.num_microbatches % schedule.num_replicas:
        return False
    instance = make_instance(
        costs,
        schedule.placement,
        num_ranks=ranks,
        num_microbatches=schedule.num_microbatches,
        latency_s=latency_s,
        memory_cap=peak_activations(schedule, costs) * (1 + 1e-9),
    )
    words = words_of(schedule, instance)
    if words is None:
        return False
    makespan_s = end_times(instance, words)[0]
    assert makespan_s <= simulate(schedule, costs, links=Links(latency_s=latency_s)).makespan_s * (1 + 1e-9)
    assert lower_bound(instance) <= makespan_s * (1 + 1e-9)
    layout = layout_of(instance)
    every_rank = np.ones(ranks, dtype=np.bool_)
    limit_s = makespan_s + instance.time_slack_s
    assert tighten(instance.tables, layout, root_node(instance, layout), limit_s, every_rank)
    return True


@pytest.mark.parametrize("name", NAMED)
def test_no_named_order_beats_the_bound_under_its_own_peaks(name):
    assert sum(check_named_order(name, seed) for seed in range(12)) >= 1


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMED)
def test_no_named_order_beats_the_bound_at_the_full_count(name):
    assert sum(check_named_order(name, seed) for seed in range(100, 600)) >= 20
