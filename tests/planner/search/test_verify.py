"""A certificate is checked again, and one that was tampered with is refused."""

from __future__ import annotations

from random import Random

import pytest

from stagewright.planner.documents import TrainingJob
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.planning import make_plan
from stagewright.planner.search.brute_force import best_completion
from stagewright.planner.search.pricing import NUM_MICROBATCHES, PP, configuration_of
from stagewright.planner.search.problem import Candidate
from stagewright.planner.search.reproof import least_step_s, still_open
from stagewright.planner.search.space import schedule_sizes
from stagewright.planner.search.verify import verify_certificate
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory
from tests.planner.search.random_problems import random_problem


def test_a_certificate_holds_and_a_changed_one_does_not() -> None:
    profile = profile_factory(4, jitter=0.3)
    job = TrainingJob(global_batch=4, sequence_length=128, precision="fp32")
    plan = make_plan(profile, cluster_factory(2), job).plan
    assert plan is not None and plan.certificate is not None
    reproof = verify_certificate(plan, profile)
    assert (
        reproof is not None and reproof.reproved + reproof.programs == reproof.candidates == plan.certificate.candidates
    )
    for change in ({"objective": 1e-9}, {"gap": 0.5}, {"bound": 1e9}):
        changed = plan.model_copy(update={"certificate": plan.certificate.model_copy(update=change)})
        with pytest.raises(InvalidDocument, match=r"certificate|bound|gap"):
            verify_certificate(changed, profile)


def test_a_worse_plan_that_claims_to_be_optimal_is_refuted_by_a_better_one() -> None:
    profile = profile_factory(4, jitter=0.3)
    job = TrainingJob(global_batch=4, sequence_length=128, precision="fp32")
    outcome = make_plan(profile, cluster_factory(2), job, gap=0.0, top=8)
    assert outcome.plan is not None and outcome.plan.certificate is not None
    worse = outcome.alternatives[-1]
    assert worse.step_time_s > 1.001 * outcome.plan.prediction.step_time_s
    claim = {"objective": worse.step_time_s, "bound": worse.step_time_s, "gap": 0.0, "status": "optimal"}
    claimed = worse.plan.model_copy(update={"certificate": outcome.plan.certificate.model_copy(update=claim)})
    with pytest.raises(InvalidDocument, match="nothing is below"):
        verify_certificate(claimed, profile)


def test_a_space_with_other_candidates_than_the_certificate_counts_is_refused() -> None:
    profile = profile_factory(4, jitter=0.3)
    job = TrainingJob(global_batch=4, sequence_length=128, precision="fp32")
    plan = make_plan(profile, cluster_factory(2), job).plan
    assert plan is not None and plan.certificate is not None
    fewer = plan.certificate.model_copy(update={"candidates": plan.certificate.candidates - 1})
    with pytest.raises(InvalidDocument, match="the declared space has"):
        verify_certificate(plan.model_copy(update={"certificate": fewer}), profile)


def test_arithmetic_leaves_every_candidate_open_at_the_step_of_its_best_completion() -> None:
    assert sum(_num_completed(seed) for seed in range(40)) > 60


def _num_completed(seed: int) -> int:
    """Return how many of some candidates have a completion; no bound may say that it does not exist."""
    draw, problem = Random(seed), random_problem(seed, most_layers=5)
    layers, found = problem.profile.num_layers, 0
    for row in draw.sample(range(len(problem.priced)), min(12, len(problem.priced))):
        shape = problem.priced.shape[row]
        sizes = list(
            schedule_sizes(problem.rules, problem.job.space, int(shape[PP]), int(shape[NUM_MICROBATCHES]), layers)
        )
        for rule, chunks in draw.sample(sizes, min(2, len(sizes))):
            best = best_completion(problem, Candidate(configuration_of(shape), rule, chunks))
            if best is not None:
                found += 1
                step_s = best[0] * (1 + 1e-5)
                assert still_open(problem, problem.priced, [(row, rule, chunks)], step_s) == [True], (seed, rule.name)
                assert least_step_s(problem.priced, row, problem.classes.counts, rule) <= step_s, (seed, rule.name)
    return found
