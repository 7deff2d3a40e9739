"""Plans whose stages differ equal exhaustive simulation of their declared space, and beat plans that ignore differences."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stagewright.planner.search.brute_force import best_by_stage, best_of_all
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.pool_search import ChoiceSets, PoolSearch
from stagewright.planner.search.pool_space import PoolSpace, Skeleton
from stagewright.planner.search.pricing import CP, SP, TP, VOCAB
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.stage_answer import solve_mixed
from stagewright.planner.search.stage_candidate import StageCandidate
from stagewright.planner.search.stage_closing import StageCloser
from stagewright.planner.search.verify import verify_certificate

sys.path.insert(0, str(Path(__file__).parent))

from random_mixed_problems import all_candidates, random_mixed_problem


def _exhaustive_step_s(space: PoolSpace) -> float | None:
    """Return the least step of all candidates; one whose average rank alone works as long cannot be shorter."""
    least: float | None = None
    pairs = [(_average_rank_s(candidate), place, candidate) for place, candidate in enumerate(all_candidates(space))]
    for average_s, _, candidate in sorted(pairs, key=lambda pair: pair[:2]):
        if least is not None and average_s >= least:
            break
        found = best_by_stage(candidate)
        if found is not None and (least is None or found[0] < least):
            least = found[0]
    return least


def _average_rank_s(candidate: StageCandidate) -> float:
    """Return the seconds of all layers, each at its fastest stage, over the number of ranks: some rank has as much to do."""
    each = np.min([costs.time_s for costs in candidate.layers], axis=0)
    return float(candidate.num_microbatches * each.sum() / candidate.order.num_ranks)


def _agrees(seed: int, *, most_layers: int = 5) -> bool:
    """Check one problem; return whether it had a plan."""
    problem = random_mixed_problem(seed, most_layers=most_layers)
    limits = Limits(gap=0.0)
    search = PoolSearch(PoolSpace(problem, split=problem.job.space.per_stage_degrees), limits)
    oracle_s = _exhaustive_step_s(search.space)
    bound_s, _ = search.run()
    if oracle_s is None:
        assert search.best is None
        return False
    assert search.best is not None
    assert search.best.step_s == pytest.approx(oracle_s, rel=1e-9)
    assert bound_s == pytest.approx(oracle_s, rel=1e-9)
    plan = search.best.candidate.scored(search.best.partition, "exact")
    assert plan.prediction.step_time_s == pytest.approx(oracle_s, rel=1e-9)
    return True


def test_the_search_over_pools_equals_exhaustive_simulation_on_random_small_problems() -> None:
    with_plan = sum(_agrees(seed, most_layers=4) for seed in range(16))
    assert with_plan >= 8


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_search_over_pools_equals_exhaustive_simulation_on_five_hundred_random_small_problems() -> None:
    with_plan = sum(_agrees(seed, most_layers=4) for seed in range(1000, 1500))
    assert with_plan >= 250


def _whole_agrees(seed: int) -> bool | None:
    """Check the answer on a mixed cluster; return whether there is a plan, None where the cluster is not mixed.

    The plans are those of all sequences of pools and, on each node group alone, of every schedule of one kind of device.
    """
    problem = random_mixed_problem(seed, most_layers=4)
    if not problem.cluster.is_mixed:
        return None
    steps = [_exhaustive_step_s(PoolSpace(problem))]
    for group in problem.cluster.groups:
        cluster = problem.cluster.model_copy(
            update={"groups": tuple(sorted(problem.cluster.groups, key=lambda other: other.name != group.name))}
        )
        part = Problem(problem.profile, cluster, problem.job, group.num_devices, (group.num_devices,))
        found = best_of_all(part, part.candidates())
        steps.append(None if found is None else found[0])
    outcome = solve_mixed(problem, Limits(gap=0.0))
    least_s = min((step for step in steps if step is not None), default=None)
    if least_s is None:
        assert outcome.status == "infeasible"
        return False
    assert outcome.status == "optimal"
    assert outcome.objective_s == pytest.approx(least_s, rel=1e-9)
    assert outcome.plan is not None
    assert outcome.plan.cluster.num_devices == problem.cluster.num_devices
    verify_certificate(outcome.plan, problem.profile)
    return True


def test_an_answer_on_a_mixed_cluster_is_the_best_of_all_pools_and_of_each_group_with_the_others_idle() -> None:
    assert [_whole_agrees(seed) for seed in range(12)].count(True) >= 4


@pytest.mark.parametrize("seed", [2106, 2114, 2143])
def test_a_plan_that_fits_by_its_prediction_alone_is_not_held_against_a_certificate(seed: int) -> None:
    assert _whole_agrees(seed)  # a weight that two layers of one stage share is counted with both by the space's ledger


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_answers_on_two_hundred_mixed_clusters_are_the_best_of_all_pools_and_of_each_group_alone() -> None:
    assert [_whole_agrees(seed) for seed in range(2000, 2200)].count(True) >= 60


def _closer(search: PoolSearch, sets: ChoiceSets, target_s: float) -> StageCloser | None:
    merged = search._merged(sets)
    if merged is None:
        return None
    return StageCloser(merged, lambda: target_s, found=lambda *_: None, should_stop=lambda: False, most_nodes=20)


@pytest.mark.parametrize("seed", range(6))
def test_what_sets_of_choices_cost_together_is_never_above_the_best_plan_of_any_product_of_them(seed: int) -> None:
    draw, checked = np.random.default_rng(seed), 0
    problem = random_mixed_problem(3000 + seed, most_layers=4)
    space = PoolSpace(problem, split=problem.job.space.per_stage_degrees)
    search = PoolSearch(space, Limits(gap=0.0))
    skeletons = list(space.skeletons())
    for index in draw.permutation(len(skeletons))[:12].tolist():
        skeleton = skeletons[index]
        sizes = [len(rows) for _, _, rows in space.rows(skeleton)]
        if 0 in sizes:
            continue
        rows = tuple(np.sort(draw.choice(size, draw.integers(1, size + 1), replace=False)) for size in sizes)
        for rule in space.rules_for(skeleton):
            sets = ChoiceSets(skeleton, rule, rows)
            ones = [
                space.candidate(skeleton, search._shapes_of(sets, chosen), rule)
                for chosen in np.ndindex(*(len(each) for each in rows))
            ]
            found = [best_by_stage(one) for one in ones if one is not None]
            least_s = min((pair[0] for pair in found if pair is not None), default=float("inf"))
            closer = _closer(search, sets, 2.0 * least_s)
            if closer is not None:
                assert closer.run() <= least_s * (1 + 1e-9)
                checked += 1
    assert checked >= 6


@pytest.mark.parametrize("seed", range(6))
def test_pools_have_alike_what_no_run_takes_unlike_and_all_ways_to_do_so_are_searched(seed: int) -> None:
    problem = random_mixed_problem(3000 + seed, most_layers=4)
    space = PoolSpace(problem, split=problem.job.space.per_stage_degrees)
    ways: dict[Skeleton, set[tuple[int, ...]]] = {}
    for skeleton in space.skeletons():
        columns = list(space.alike_columns(skeleton))
        if problem.profile.trained_ties and len(skeleton.pools) > 1:
            assert set(columns) >= {TP, VOCAB}
        if skeleton.graph is not None and len(skeleton.pools) > 1:
            assert set(columns) >= {TP, CP, SP}
        way = tuple(value for _, value in skeleton.alike)
        for _, priced, rows in space.rows(skeleton):
            assert (priced.shape[rows][:, columns] == way).all()
        if columns:
            ways.setdefault(replace(skeleton, alike=()), set()).add(way)
    for skeleton, found in ways.items():
        columns = list(space.alike_columns(skeleton))
        each = [
            {tuple(way) for way in priced.shape[rows][:, columns].tolist()} for _, priced, rows in space.rows(skeleton)
        ]
        assert set.intersection(*each) == found


def test_halves_of_sets_hold_every_product_once() -> None:
    problem = random_mixed_problem(3, most_layers=4)
    space = PoolSpace(problem, split=problem.job.space.per_stage_degrees)
    search = PoolSearch(space, Limits(gap=0.0))
    waiting, ones = [], 0
    for skeleton in space.skeletons():
        rows = tuple(np.arange(len(each)) for _, _, each in space.rows(skeleton))
        if all(len(each) for each in rows):
            waiting += [ChoiceSets(skeleton, rule, rows) for rule in space.rules_for(skeleton)]
    waiting = [sets for sets in waiting if search._merged(sets) is not None]
    seen = set()
    while waiting:
        sets = waiting.pop()
        if sets.num_products > 1:
            merged = search._merged(sets)
            assert merged is not None
            parts = sets.halves(merged)
            assert sum(part.num_products for part in parts) == sets.num_products
            waiting += parts
            continue
        ones += 1
        seen.add((sets.skeleton, sets.rule.name, tuple(search._shapes_of(sets))))
    assert len(seen) == ones > 10
