"""Each objective finds what exhaustive simulation finds, and its bound is the same number."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.outcome import PlanOutcome, Progress
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.planning import make_plan
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.verify import verify_certificate
from stagewright.testing.mocked_cluster import cluster_factory

sys.path.insert(0, str(Path(__file__).parent))

from completions import Completed, every_completion, small_question


def _everything(seed: int, **question: object) -> list[Completed]:
    profile, cluster, job = small_question(seed, **question)  # type: ignore[arg-type]
    return every_completion(Problem(profile, cluster, job, cluster.num_devices))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_least_peak_equals_the_exhaustive_one_and_the_fastest_of_those_is_taken(seed: int) -> None:
    outcome = make_plan(*small_question(seed, objective="min-max-memory"))
    everything = _everything(seed)
    least = min(item.peak_bytes for item in everything)
    assert outcome.status == "optimal" and outcome.objective_name == "peak_memory_bytes"
    assert outcome.objective == pytest.approx(least, rel=1e-9)
    assert outcome.bound is not None and least * (1 - 1e-6) <= outcome.bound <= least * (1 + 1e-9)
    fastest = min(item.step_s for item in everything if item.peak_bytes <= least * (1 + 1e-9))
    assert outcome.objective_s == pytest.approx(fastest, rel=1e-9)
    assert outcome.plan is not None
    verify_certificate(outcome.plan, small_question(seed)[0])


def test_the_least_peak_under_a_step_deadline_is_the_exhaustive_one() -> None:
    everything = _everything(2)
    steps = sorted(item.step_s for item in everything)
    most_s = steps[len(steps) // 20]
    outcome = make_plan(*small_question(2, objective="min-max-memory", step_deadline_s=most_s))
    least = min(item.peak_bytes for item in everything if item.step_s <= most_s)
    assert outcome.objective == pytest.approx(least, rel=1e-9)
    assert outcome.objective_s is not None and outcome.objective_s <= most_s


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_the_fewest_devices_under_a_deadline_are_the_exhaustive_ones(share: float) -> None:
    everything = _everything(3)
    steps = sorted(item.step_s for item in everything)
    most_s = steps[int(len(steps) * share)]
    outcome = make_plan(*small_question(3, objective="fewest-devices", step_deadline_s=most_s))
    assert outcome.status == "optimal" and outcome.plan is not None
    fewest = min(item.num_devices for item in everything if item.step_s <= most_s)
    assert outcome.objective == outcome.bound == outcome.plan.num_devices == fewest
    verify_certificate(outcome.plan, small_question(3)[0])


def test_a_deadline_that_no_count_meets_is_infeasible_with_the_fastest_step() -> None:
    everything = _everything(3)
    fastest = min(item.step_s for item in everything)
    for objective in ("fewest-devices", "step-time", "min-max-memory", "tokens-per-dollar"):
        outcome = make_plan(*small_question(3, objective=objective, step_deadline_s=0.5 * fastest))
        assert outcome.status == "infeasible" and outcome.plan is None, objective
        assert outcome.diagnosis is not None and outcome.diagnosis.binding == "step_deadline_s"
        relaxed = outcome.diagnosis.relaxations[0].step_time_s
        assert relaxed == pytest.approx(fastest, rel=1e-9), objective


@pytest.mark.parametrize("seed", [4, 5])
def test_tokens_per_dollar_are_the_exhaustive_ones(seed: int) -> None:
    outcome = make_plan(*small_question(seed, objective="tokens-per-dollar"))
    everything = _everything(seed)
    cost = min(item.num_devices * item.step_s for item in everything)
    assert outcome.status == "optimal" and outcome.plan is not None
    assert outcome.objective == pytest.approx(4 * 128 * 3600 / (2.0 * cost), rel=1e-9)
    assert outcome.objective == pytest.approx(outcome.plan.prediction.tokens_per_dollar, rel=1e-9)
    verify_certificate(outcome.plan, small_question(seed)[0])


def test_a_device_without_a_price_is_refused_with_the_way_out() -> None:
    profile, _, job = small_question(0, objective="tokens-per-dollar")
    with pytest.raises(InvalidArgument, match="has no price") as error:
        make_plan(profile, cluster_factory(2), job)
    assert error.value.hint is not None and "--price-per-hour" in error.value.hint


@pytest.mark.parametrize("seed", [6, 7])
def test_the_frontier_is_the_exhaustive_pareto_set(seed: int) -> None:
    outcome = make_plan(*small_question(seed, objective="frontier", layers=4, devices=2))
    everything = _everything(seed, layers=4, devices=2)
    expected = _pareto(everything)
    found = [(point.num_devices, point.peak_memory_bytes, point.step_time_s) for point in outcome.frontier]
    assert len(found) == len(expected) >= 4
    for left, right in zip(found, expected, strict=True):
        assert left == pytest.approx(right, rel=1e-8)
    assert outcome.status == "optimal"


def _pareto(everything: list[Completed]) -> list[tuple[int, float, float]]:
    rows = sorted({(item.num_devices, item.peak_bytes, item.step_s) for item in everything})
    kept: list[tuple[int, float, float]] = []
    for row in rows:
        if not any(all(a <= b * (1 + 1e-9) for a, b in zip(other, row, strict=True)) for other in kept):
            kept.append(row)
    return kept


def test_a_coarse_frontier_is_near_every_exhaustive_point() -> None:
    profile, cluster, job = small_question(6, objective="frontier", layers=4, devices=2)
    outcome = make_plan(profile, cluster, job, gap=0.1)
    assert outcome.gap is not None and outcome.gap <= 0.1 + 1e-9
    _assert_near(outcome, _pareto(_everything(6, layers=4, devices=2)))


@pytest.mark.parametrize("searches", [1, 2, 5, 9])
def test_a_frontier_that_is_stopped_says_how_far_any_plan_may_be_from_its_points(searches: int) -> None:
    profile, cluster, job = small_question(6, objective="frontier", layers=4, devices=2)
    seen: list[Progress] = []
    outcome = make_plan(
        profile, cluster, job, gap=0.001, progress=seen.append, should_stop=lambda: len(seen) >= searches
    )
    assert outcome.termination == "cancelled" and outcome.status == "feasible" and outcome.frontier
    _assert_near(outcome, _pareto(_everything(6, layers=4, devices=2)))


def _assert_near(outcome: PlanOutcome, rows: list[tuple[int, float, float]]) -> None:
    assert outcome.gap is not None
    for devices, peak, step_s in rows:
        assert any(
            point.num_devices <= devices
            and point.peak_memory_bytes <= peak * (1 + outcome.gap + 1e-9)
            and point.step_time_s <= step_s * (1 + outcome.gap + 1e-9)
            for point in outcome.frontier
        )


def test_other_planners_refuse_objectives_that_are_not_theirs() -> None:
    with pytest.raises(InvalidArgument, match="objective of its own"):
        make_plan(*small_question(0, objective="frontier"), planner="megatron")


def test_a_catalogue_model_takes_fewer_devices_for_a_longer_deadline() -> None:
    profile, cluster = resolve_model("gpt2"), resolve_cluster("a100-sxm-80g:4x1")
    counts = []
    for most_s in (0.2, 0.4):
        job = TrainingJob(global_batch=64, sequence_length=1024, objective="fewest-devices", step_deadline_s=most_s)
        outcome = make_plan(profile, cluster, job)
        assert outcome.plan is not None and outcome.plan.prediction.step_time_s <= most_s
        counts.append(outcome.plan.num_devices)
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[1]
