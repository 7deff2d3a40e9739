"""Arithmetic over pools closes no product of choices that has a plan, and refutes bounds that are too high."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.planning import make_plan
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.pool_reproof import PoolReproof
from stagewright.planner.search.pool_space import PoolSpace
from stagewright.planner.search.stage_answer import solve_by_stage, solve_mixed
from stagewright.planner.search.verify import verify_certificate
from stagewright.testing.mocked_cluster import cluster_factory, mixed_cluster_factory
from stagewright.testing.mocked_profile import profile_factory
from tests.planner.search.random_mixed_problems import random_mixed_problem

CUTS = 4  # partitions of each product


def test_every_partition_that_fits_is_reached_within_its_own_step() -> None:
    assert sum(_num_reached(seed) for seed in range(10)) > 300


def _num_reached(seed: int) -> int:
    """Return how many random partitions of a random problem fit; each has to be within reach of its own step."""
    draw = Random(seed)
    problem = random_mixed_problem(seed)
    space = PoolSpace(problem, split=not problem.cluster.is_mixed)
    layers, plans = problem.profile.num_layers, 0
    skeletons = list(space.skeletons())
    for skeleton in draw.sample(skeletons, min(150, len(skeletons))):
        rows = [rows for _, _, rows in space.rows(skeleton)]
        if not all(map(len, rows)):
            continue
        places = tuple(draw.randrange(len(each)) for each in rows)
        rule = draw.choice(space.rules_for(skeleton))
        chosen = [int(each[place]) for each, place in zip(rows, places, strict=True)]
        candidate = space.candidate(skeleton, chosen, rule)
        for _ in range(CUTS if candidate is not None else 0):
            assert candidate is not None
            cuts = np.array([0, *sorted(draw.sample(range(1, layers), skeleton.num_ranks - 1)), layers])
            inside = (candidate.windows[:, 0] <= cuts) & (cuts <= candidate.windows[:, 1])
            partition = candidate.complete(cuts.tolist()) if inside.all() else None
            if partition is not None:
                plans += 1
                reproof = PoolReproof(space, candidate.step_s(partition) * (1 + 1e-5))
                assert reproof.reached(skeleton, rule)[places] >= layers
    return plans


@pytest.mark.parametrize("seed", [3, 5, 8])
def test_what_is_proved_of_plans_whose_stages_differ_counts_their_whole_space(seed: int) -> None:
    problem = random_mixed_problem(seed)
    solve = solve_mixed if problem.cluster.is_mixed else solve_by_stage
    plan = solve(problem, Limits(gap=0.0)).plan
    if plan is None:
        return
    assert plan.certificate is not None
    reproof = verify_certificate(plan, problem.profile)
    assert reproof is not None and reproof.candidates == plan.certificate.candidates > 0
    assert reproof.reproved + reproof.programs == reproof.candidates
    assert reproof.attacked or not reproof.programs


def test_a_slow_plan_on_a_mixed_cluster_that_claims_to_be_optimal_is_refuted() -> None:
    profile = profile_factory(6, jitter=0.3)
    cluster = mixed_cluster_factory([cluster_factory(2), cluster_factory(2, flops=100e12)])
    job = TrainingJob(global_batch=8, sequence_length=128, precision="fp32")
    best = make_plan(profile, cluster, job, gap=0.0).plan
    assert best is not None and best.certificate is not None
    reproof = verify_certificate(best, profile)
    assert reproof is not None and reproof.reproved > 0.5 * reproof.candidates
    pinned = job.space.model_copy(
        update={"pins": job.space.pins.model_copy(update={"microbatch": 1, "schedule": "naive"})}
    )
    slow = make_plan(profile, cluster, job.model_copy(update={"space": pinned}), gap=0.0).plan
    assert slow is not None
    step_s = slow.prediction.step_time_s
    assert step_s > 1.001 * best.prediction.step_time_s
    claim = {"objective": step_s, "bound": step_s, "gap": 0.0, "status": "optimal"}
    certificate = best.certificate.model_copy(update=claim)
    claimed = slow.model_copy(update={"job": job, "certificate": certificate})
    with pytest.raises(InvalidDocument, match="nothing is below"):
        verify_certificate(claimed, profile)


@pytest.mark.parametrize("objective", ["tokens-per-dollar", "fewest-devices", "min-max-memory"])
def test_other_objectives_are_proved_again_by_their_numbers_of_devices(objective: str) -> None:
    profile = profile_factory(4, jitter=0.2)
    cluster = cluster_factory(2)
    device = cluster.groups[0].device.model_copy(update={"price_per_hour": 2.0})
    group = cluster.groups[0].model_copy(update={"device": device})
    cluster = cluster.model_copy(update={"groups": (group,)})
    space = SearchSpace(schedules=("1f1b", "gpipe", "zb-h1"))
    job = TrainingJob(global_batch=6, sequence_length=128, precision="fp32", space=space)
    fastest = make_plan(profile, cluster, job, gap=0.0).plan
    assert fastest is not None
    most_s = 1.3 * fastest.prediction.step_time_s
    job = job.model_copy(update={"objective": objective, "step_deadline_s": most_s})
    plan = make_plan(profile, cluster, job, gap=0.0).plan
    assert plan is not None and plan.certificate is not None and plan.num_devices > 1
    reproof = verify_certificate(plan, profile)
    assert reproof is not None and (reproof.reproved or objective == "min-max-memory")
    # Plans beat bounds that halve the tokens, or double the devices or the bytes.
    is_money = objective == "tokens-per-dollar"
    wrong = {"objective": plan.certificate.objective, "bound": plan.certificate.bound * (0.5 if is_money else 2.0)}
    with pytest.raises(InvalidDocument):
        verify_certificate(plan.model_copy(update={"certificate": plan.certificate.model_copy(update=wrong)}), profile)


def test_steps_of_reaches_grow_with_where_they_begin() -> None:
    space = PoolSpace(random_mixed_problem(3))
    reproof = PoolReproof(space, 0.02)
    for skeleton in space.skeletons():
        for split in (False, True):
            for pool in range(len(skeleton.pools)):
                reach = reproof.reach_of_rank(skeleton, pool, split, live=2.0)
                assert (np.diff(reach, axis=1) >= 0).all()
