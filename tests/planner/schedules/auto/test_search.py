"""The search as users call it: never worse than named schedules, exact where small, reproducible, honest about its bound."""

from __future__ import annotations

import csv
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from stagewright.planner.errors import Infeasible, InvalidArgument, StagewrightError
from stagewright.planner.schedules import registry
from stagewright.planner.schedules.auto import AutoRequest, PlacementChoice, Stop, search
from stagewright.planner.schedules.auto.branching import improve_exactly
from stagewright.planner.schedules.auto.milp import solve_milp
from stagewright.planner.schedules.auto.site import sites, stage_costs
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import peak_activations
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate

ROWS_IN_SUITE = slice(0, None, 15)


def _published(folder: Path) -> list[dict[str, str]]:
    with (folder / "schedules.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _search_row(line: dict[str, str], evaluations: int, *, free: bool) -> float:
    name = line["schedule"]
    forward, input_grad, weight_grad, latency = (float(cost) for cost in line["F/I/W/comm"].split("/"))
    chunks = 4 if "v=4" in name else 1 if name.startswith(("ZB-H", "ZB(")) or name == "1F1B" else 2
    is_v = any(part in name for part in ("ZB-V", "V-", "-V", "ZBV", "DualPipeV"))
    own = PlacementChoice.V if is_v and chunks == 2 else PlacementChoice.LOOP
    ranks = int(line["ranks"])
    found = search(
        AutoRequest(
            ranks,
            int(line["microbatches"]),
            StageCosts.uniform(ranks, forward_s=forward, input_grad_s=input_grad, weight_grad_s=weight_grad),
            latency_s=latency,
            memory_cap=max(float(peak) for peak in line["peak_freed_at_W"].split("..")),
            placement=PlacementChoice.ANY if free else own,
            chunk_counts=(1, 2, 4) if free else (chunks,),
            evaluations=evaluations,
        )
    )
    assert found.bound_s <= found.makespan_s * (1 + 1e-9)
    return found.makespan_s


def test_no_published_row_is_better(peer_profiles):
    for line in _published(peer_profiles)[ROWS_IN_SUITE]:
        assert _search_row(line, 100_000, free=False) <= float(line["makespan"]) * (1 + 1e-9), line["schedule"]


@pytest.mark.soak
def test_all_published_rows_on_their_own_and_on_a_free_placement(peer_profiles):
    lines = _published(peer_profiles)
    own, free, unequal = [], [], []
    for line in lines:
        own.append(_search_row(line, 2_000_000, free=False) / float(line["makespan"]))
        free.append(_search_row(line, 2_000_000, free=True) / float(line["makespan"]))
        unequal.append(line["F/I/W/comm"] != "1/1/1/0")
    assert max(own) <= 1 + 1e-9
    assert max(free) <= 1 + 1e-9
    assert sum(ratio < 1 - 1e-9 for ratio, is_unequal in zip(own, unequal, strict=True) if is_unequal) >= 24
    assert all(ratio < 1 - 1e-9 for ratio, is_unequal in zip(free, unequal, strict=True) if is_unequal)


def _random_request(seed: int, most_ranks: int, evaluations: int) -> AutoRequest:
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(2, most_ranks + 1))
    layers = 4 * ranks
    forward, input_grad, weight_grad = rng.uniform(0.5, 1.5, (3, layers)) / 4
    return AutoRequest(
        ranks,
        int(rng.integers(2, 4 * ranks + 1)),
        StageCosts.of(forward, input_grad, weight_grad, activation=np.full(layers, 0.25)),
        latency_s=float(rng.choice([0.0, 0.05, 0.2, 0.5])),
        memory_cap=max(1.0, float(rng.choice([0.5, 0.75, 1.0, 1.5, 2.0])) * ranks),
        evaluations=evaluations,
    )


def _assert_no_named_schedule_is_better(request: AutoRequest) -> None:
    """Generate every named schedule anew, simulate it, and compare those that fit the cap."""
    found = search(request)
    assert found.bound_s <= found.makespan_s * (1 + 1e-9)
    links = Links(latency_s=request.latency_s)
    assert simulate(found.schedule, found.costs, links=links).makespan_s == pytest.approx(found.makespan_s, rel=1e-9)
    assert peak_activations(found.schedule, found.costs).max() <= request.memory_cap + 1e-9
    for chunks in request.chunk_counts:
        costs = stage_costs(request.costs, request.num_ranks * chunks)
        assert costs is not None
        for family in registry.families():
            shares_evenly = request.num_microbatches % family.num_replicas == 0
            if not family.synchronous or not family.plain or not shares_evenly:
                continue
            try:
                schedule = family.generate(
                    ScheduleRequest(
                        request.num_ranks,
                        request.num_microbatches,
                        num_chunks=chunks,
                        costs=costs,
                        latency_s=request.latency_s,
                    )
                )
                makespan_s = simulate(schedule, costs, links=links).makespan_s
            except StagewrightError:
                continue
            is_comparable = schedule.num_microbatches == request.num_microbatches and schedule.num_slices == 1
            if is_comparable and peak_activations(schedule, costs).max() <= request.memory_cap + 1e-9:
                assert found.makespan_s <= makespan_s * (1 + 1e-9), family.name


@pytest.mark.parametrize("seed", range(1, 3))
def test_no_named_schedule_that_fits_is_better_on_uneven_costs(seed):
    _assert_no_named_schedule_is_better(_random_request(seed, 5, 60_000))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(200))
def test_no_named_schedule_that_fits_is_better_on_any_size(seed):
    _assert_no_named_schedule_is_better(_random_request(seed, 16, 1_000_000))


def _uneven_request(index: int, evaluations: int) -> AutoRequest:
    """Return instance `index` of benchmarks/auto_schedules.py."""
    rng = np.random.default_rng(index)
    ranks = int(rng.integers(2, 17))
    microbatches = int(rng.integers(2, 4 * ranks + 1))
    forward, input_grad, weight_grad = rng.uniform(0.5, 1.5, (3, 4 * ranks)) / 4
    cap = float(rng.choice([0.5, 0.75, 1.0, 1.5, 2.0])) * ranks
    return AutoRequest(
        ranks,
        microbatches,
        StageCosts.of(forward, input_grad, weight_grad, activation=np.full(4 * ranks, 0.25)),
        latency_s=float(rng.choice([0.0, 0.05, 0.2, 0.5])),
        memory_cap=max(1.0, cap),
        evaluations=evaluations,
    )


@pytest.mark.parametrize(
    ("index", "name"), [(23, "chimera"), (57, "chimera"), pytest.param(72, "dualpipe", marks=pytest.mark.soak)]
)
def test_two_copies_are_taken_where_a_named_schedule_of_two_is_shorter_than_the_best_order_of_one(index, name):
    request = _uneven_request(index, 20_000)
    one = search(replace(request, copies=1))
    costs = stage_costs(request.costs, request.num_ranks)
    assert costs is not None
    links = Links(latency_s=request.latency_s)
    named = registry.generate(
        name, ScheduleRequest(request.num_ranks, request.num_microbatches, costs=costs, latency_s=request.latency_s)
    )
    named_s = simulate(named, costs, links=links).makespan_s
    assert peak_activations(named, costs).max() <= request.memory_cap
    assert named_s < one.makespan_s
    found = search(request)
    assert found.num_copies == 2
    assert found.makespan_s <= named_s * (1 + 1e-9)
    assert (found.one_copy.makespan_s, found.one_copy.bound_s) == (one.makespan_s, one.bound_s)
    assert found.bound_s <= min(found.makespan_s, one.bound_s) * (1 + 1e-9)
    validate(found.schedule)
    timeline = simulate(found.schedule, found.costs, links=links)
    assert timeline.makespan_s == pytest.approx(found.makespan_s, rel=1e-9)
    assert peak_activations(found.schedule, found.costs).max() <= request.memory_cap + 1e-9


@pytest.mark.parametrize(
    "change",
    [
        {"copies": 1},
        {"placement": PlacementChoice.LOOP},
        {"placement": np.arange(4, dtype=np.int32)},
        {"chunk_counts": (2, 4)},
        {"num_microbatches": 7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_one_copy_is_kept_where_the_request_rules_out_two(change):
    request = replace(_request(memory_cap=4.0, evaluations=2_000), **change)
    found = search(request)
    assert found.num_copies == found.schedule.num_replicas == 1
    assert (found.one_copy.makespan_s, found.one_copy.bound_s) == (found.makespan_s, found.bound_s)


@pytest.mark.parametrize("seed", range(6))
def test_tiny_instances_of_two_copies_get_the_best_of_all_their_orders(seed, random_instance, brute_force):
    ranks = (2, 3, 4)[seed % 3]
    instance = random_instance(np.random.default_rng(seed), ranks, 2, both_ways=True)
    best_s = brute_force(instance)
    found = search(
        AutoRequest(
            ranks,
            2,
            _first_stages(instance.costs, ranks),
            latency_s=instance.latency_s,
            memory_cap=instance.cap if np.isfinite(instance.cap).all() else None,
            chunk_counts=(1,),
            evaluations=5_000,
        )
    )
    assert found.stop is Stop.OPTIMAL
    assert found.makespan_s == pytest.approx(min(best_s, found.one_copy.makespan_s), rel=1e-9)
    assert found.bound_s == pytest.approx(found.makespan_s, rel=1e-9)
    assert found.num_copies == (2 if best_s < found.one_copy.makespan_s * (1 - 1e-9) else 1)


def _first_stages(costs: StageCosts, count: int) -> StageCosts:
    return StageCosts(**{field.name: getattr(costs, field.name)[:count] for field in fields(costs)})


@pytest.mark.parametrize("seed", range(4))
def test_operators_go_to_the_ranks_that_the_integer_programme_proves_best_of_all_maps(seed):
    rng = np.random.default_rng(seed)
    operators, microbatches = ((4, 2), (5, 1), (3, 3), (4, 2))[seed]
    costs = StageCosts.of(*rng.uniform(0.5, 2.0, (3, operators)))
    cap, latency_s = (None, 4.0, 3.0, 5.0)[seed], (0.0, 0.1, 0.1, 0.0)[seed]
    request = AutoRequest(
        2, microbatches, costs, latency_s, cap, PlacementChoice.OPERATORS, copies=1, evaluations=20_000
    )
    found = search(request)
    assert found.stop is Stop.OPTIMAL
    limit_s = 1.5 * found.makespan_s
    proved = [solve_milp(site.instance, limit_s) for site in sites(request)]
    assert found.makespan_s == pytest.approx(min(each for each in proved if each is not None), rel=1e-6)
    assert len(proved) > 1
    timeline = simulate(found.schedule, found.costs, links=Links(latency_s=latency_s))
    assert timeline.makespan_s == pytest.approx(found.makespan_s, rel=1e-9)
    if operators % 2 == 0:
        contiguous = search(replace(request, placement=PlacementChoice.ANY))
        assert found.makespan_s <= contiguous.makespan_s * (1 + 1e-9)


def test_too_many_maps_of_operators_are_refused_with_their_number():
    with pytest.raises(InvalidArgument, match="8 entries go to 4 ranks in 65536 ways, at most 4096"):
        search(AutoRequest(4, 2, StageCosts.uniform(8), placement=PlacementChoice.OPERATORS))
    with pytest.raises(InvalidArgument, match="2 entries cannot leave none of 3 ranks empty"):
        search(AutoRequest(3, 2, StageCosts.uniform(2), placement=PlacementChoice.OPERATORS))


@pytest.mark.parametrize(
    ("ranks", "microbatches", "seconds", "latency_s"),
    [(4, 8, (1.0, 1.0, 1.0), 0.0), (4, 8, (10.0, 12.0, 8.0), 1.0), (8, 16, (1.0, 1.0, 1.0), 0.0)],
)
def test_at_dualpipes_memory_less_than_half_of_its_bubble_is_left(ranks, microbatches, seconds, latency_s):
    """The claim of operator-level planning against DualPipe, with two copies of the weights as it keeps them."""
    forward_s, input_grad_s, weight_grad_s = seconds
    costs = StageCosts.uniform(ranks, forward_s=forward_s, input_grad_s=input_grad_s, weight_grad_s=weight_grad_s)
    dualpipe = registry.generate("dualpipe", ScheduleRequest(ranks, microbatches, costs=costs, latency_s=latency_s))
    cap = peak_activations(dualpipe, costs).max()
    assert cap == ranks + 1
    found = search(AutoRequest(ranks, microbatches, costs, latency_s, float(cap), evaluations=100_000))
    bubble_s = simulate(dualpipe, costs, links=Links(latency_s=latency_s)).makespan_s - microbatches * sum(seconds)
    assert found.makespan_s - microbatches * sum(seconds) < 0.5 * bubble_s


@pytest.mark.parametrize("seed", range(300, 309))
def test_tiny_instances_get_the_best_of_all_orders(seed, random_instance, brute_force):
    ranks, microbatches, chunks = [(2, 2, 1), (2, 3, 1), (3, 3, 1), (2, 4, 1), (2, 1, 2), (3, 1, 2)][seed % 6]
    instance = random_instance(np.random.default_rng(seed), ranks, microbatches, chunks)
    found = search(
        AutoRequest(
            ranks,
            microbatches,
            instance.costs,
            latency_s=instance.latency_s,
            memory_cap=instance.cap if np.isfinite(instance.cap).all() else None,
            placement=instance.placement,
            evaluations=5_000,
        )
    )
    best_s = brute_force(instance)
    assert found.makespan_s == pytest.approx(best_s, rel=1e-9)
    assert found.stop is Stop.OPTIMAL
    assert found.bound_s == pytest.approx(best_s, rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_small_instances_are_within_half_a_percent_of_the_exact_optimum(seed, random_instance):
    ranks, microbatches, chunks = [(3, 4, 2), (4, 4, 2), (4, 6, 1), (2, 6, 2)][seed % 4]
    instance = random_instance(np.random.default_rng(seed * 7 + 1), ranks, microbatches, chunks, whole=seed < 4)
    found = search(
        AutoRequest(
            ranks,
            microbatches,
            instance.costs,
            latency_s=instance.latency_s,
            memory_cap=instance.cap if np.isfinite(instance.cap).all() else None,
            placement=instance.placement,
            evaluations=300_000,
        )
    )
    exact = improve_exactly(instance, found.makespan_s, nodes=2_000)
    assert found.bound_s <= exact.makespan_s * (1 + 1e-9)
    if exact.proved:
        assert found.makespan_s <= exact.makespan_s * 1.005


def _request(**changes: object) -> AutoRequest:
    settings: dict[str, object] = {"latency_s": 1.0, "memory_cap": 3.0, "evaluations": 50_000} | changes
    return AutoRequest(4, 8, StageCosts.uniform(4, forward_s=10, input_grad_s=12, weight_grad_s=8), **settings)


def test_same_request_gives_the_same_orders():
    first, second = search(_request()), search(_request())
    assert first.makespan_s == second.makespan_s
    assert all(np.array_equal(one, two) for one, two in zip(first.schedule.orders, second.schedule.orders, strict=True))


def test_result_is_simulated_alike_and_keeps_the_cap_with_backwards_merged():
    found = search(_request())
    timeline = simulate(found.schedule, found.costs, links=Links(latency_s=1.0))
    assert timeline.makespan_s == pytest.approx(found.makespan_s)
    assert peak_activations(found.schedule, found.costs).max() <= 3.0 + 1e-9
    assert any("B" in text for rank in range(4) for text in found.schedule.text(rank))


def test_gain_tells_splitting_from_reordering():
    gain = search(_request(memory_cap=4.0)).gain
    assert gain is not None
    assert gain.splitting_s >= 0.0
    assert gain.reordering_s >= 0.0
    assert gain.named_s - gain.splitting_s - gain.reordering_s == pytest.approx(gain.found_s)


def test_cap_below_one_microbatch_names_the_smallest_cap_that_works():
    with pytest.raises(Infeasible) as caught:
        search(_request(memory_cap=0.5))
    assert "0.5" in caught.value.message
    assert caught.value.hint == "the smallest cap that works is 1"


def test_more_copies_than_two_are_refused():
    with pytest.raises(InvalidArgument, match="copies is 3"):
        search(_request(copies=3))


def test_deadline_returns_the_best_so_far_and_says_so():
    found = search(_request(evaluations=50_000_000), deadline_s=0.0)
    assert found.stop is Stop.DEADLINE
    assert np.isfinite(found.makespan_s)


def test_costs_are_cut_into_groups_of_equal_count():
    costs = StageCosts.of(np.arange(1.0, 9.0), np.ones(8), np.ones(8), activation=np.full(8, 0.25))
    pairs = stage_costs(costs, 4)
    assert pairs is not None
    assert pairs.forward_s.tolist() == [3.0, 7.0, 11.0, 15.0]
    assert pairs.activation.tolist() == [0.5] * 4
    assert stage_costs(costs, 16) is None


def test_uneven_costs_of_a_rank_each_allow_one_chunk_only():
    costs = StageCosts.of([1.0, 2.0], [1.0, 1.0], [1.0, 1.0])
    assert [(site.name, site.num_chunks) for site in sites(AutoRequest(2, 4, costs))] == [("loop", 1)]
    with pytest.raises(InvalidArgument, match="2 costs"):
        sites(AutoRequest(2, 4, costs, chunk_counts=(2,)))
