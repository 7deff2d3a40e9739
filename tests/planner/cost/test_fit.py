"""Fitting efficiencies: known factors are found again, errors are honest."""

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.fit import (
    Fit,
    FittedRun,
    MeasuredRun,
    Unknown,
    adjusted_cluster,
    adjusted_profile,
    default_unknowns,
    fit_factors,
    fit_runs,
    fitted_cluster,
    predict_run,
)
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.cost.trust import expected_error
from stagewright.planner.documents import Degrees, Recompute, Source, TrainingJob
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.prediction import evaluate


def run(batch, microbatch, **degrees):
    job = TrainingJob(global_batch=batch, sequence_length=512)
    profile, cluster = resolve_model("gpt2"), resolve_cluster("a100-sxm-80g:4x1")
    choice = Choice(Degrees(**degrees), 1, 1, microbatch, "1f1b", Recompute.NONE)
    plan = even_plan(profile, cluster, job, choice)
    return MeasuredRun(f"batch {batch} {degrees}", plan, profile, evaluate(plan, profile).prediction.step_time_s)


@pytest.fixture(scope="module")
def runs():
    return [
        run(8, 2, dp=4),
        run(64, 8, dp=4),
        run(16, 8, tp=4),
        run(64, 16, dp=2, tp=2),
    ]


def measured_with(runs, factors):
    return [MeasuredRun(r.name, r.plan, r.profile, predict_run(r, factors)) for r in runs]


def test_factors_that_made_the_measurements_are_found_again(runs):
    truth = {"memory": 0.8, "link:nvlink": 0.7}
    loose = [Unknown(name, spread=10.0) for name in truth]
    found = fit_runs(measured_with(runs, truth), loose)
    for name, value in truth.items():
        assert found.factors[name] == pytest.approx(value, rel=0.03)
    assert found.error("fitted")[1] < 0.002
    assert found.error("before")[0] > 0.05


def test_held_out_runs_are_predicted_without_themselves(runs):
    changed = measured_with(runs, {"matmul": 0.8})
    odd = MeasuredRun("odd", changed[0].plan, changed[0].profile, changed[0].step_s * 1.5)
    found = fit_runs([odd, *changed[1:]], [Unknown("matmul", spread=3.0)])
    assert found.runs[0].held_out_s == pytest.approx(changed[0].step_s, rel=0.02), "the outlier does not fit itself"
    assert found.error("held_out")[0] > found.error("fitted")[0]


def test_groups_are_held_out_together(runs):
    changed = [
        MeasuredRun(r.name, r.plan, r.profile, r.step_s, "paper" if index < 2 else "other")
        for index, r in enumerate(measured_with(runs, {"matmul": 0.9}))
    ]
    found = fit_runs(changed, [Unknown("matmul", spread=3.0)])
    assert found.error("held_out")[1] < 0.02
    alone = fit_runs(
        [MeasuredRun(r.name, r.plan, r.profile, r.step_s, "one") for r in changed[:2]], [Unknown("matmul")]
    )
    assert [r.held_out_s for r in alone.runs] == [r.before_s for r in alone.runs], "nothing is left to fit on"


def test_bounds_hold_and_a_tight_prior_stays_near_one():
    def predict(factors):
        return [1.0 / factors["matmul"]]

    assert fit_factors(predict, [100.0], [Unknown("matmul", lower=0.5, spread=10.0)])["matmul"] == pytest.approx(
        0.5, rel=1e-3
    )
    kept = fit_factors(predict, [2.0], [Unknown("matmul", spread=1e-4)])["matmul"]
    assert kept == pytest.approx(1.0, abs=0.01)


def test_adjusting_a_cluster_scales_shares_within_bounds():
    cluster = resolve_cluster("a100-sxm-80g:8x2")
    slower = adjusted_cluster(cluster, {"matmul": 0.5, "link:nvlink": 2.0})
    before, after = cluster.groups[0], slower.groups[0]
    assert after.device.matmul_efficiency[-1].share == pytest.approx(before.device.matmul_efficiency[-1].share / 2)
    assert after.device.memory_efficiency == before.device.memory_efficiency
    assert after.links[0].achieved_share == 1.0
    assert after.links[1] == before.links[1]
    assert fitted_cluster(cluster, {}).groups[0].device.source is Source.FITTED
    assert adjusted_profile(resolve_model("gpt2"), {"layers": 2.0}) == resolve_model("gpt2")


def test_what_can_be_fitted_depends_on_the_profile(runs):
    names = [unknown.name for unknown in default_unknowns(runs)]
    assert names == ["matmul", "memory", "launch", "link:nvlink"]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_measured_time_that_is_none_is_refused(value):
    with pytest.raises(InvalidArgument, match="it must be above 0"):
        fit_factors(lambda factors: [1.0], [value], [Unknown("matmul")])


def test_nothing_to_fit_is_refused():
    with pytest.raises(InvalidArgument, match="no measured runs"):
        fit_factors(lambda factors: [], [], [Unknown("matmul")])
    with pytest.raises(InvalidArgument, match="nothing was named"):
        fit_factors(lambda factors: [1.0], [1.0], [])


def test_the_document_holds_both_errors():
    found = Fit({"matmul": 1.0}, (FittedRun("a", 1.0, 1.5, 1.1, 1.2), FittedRun("b", 1.0, 0.5, 0.9, 0.9)))
    document = found.to_json()
    assert document["error"]["in_sample"] == {"mean": pytest.approx(0.1), "worst": pytest.approx(0.1)}
    assert document["error"]["cross_validated"]["mean"] == pytest.approx(0.15)
    assert document["error"]["before"]["worst"] == pytest.approx(0.5)
    assert np.isfinite(document["runs"][0]["held_out_s"])


def test_expected_errors_grow_as_numbers_get_less_direct():
    device = resolve_cluster("a100-sxm-80g:8x1").groups[0].device
    unfitted = resolve_cluster("l4:8x1").groups[0].device
    errors = [
        expected_error(Source.MEASURED, device),
        expected_error(Source.ANALYTIC, device),
        expected_error(Source.ANALYTIC, unfitted),
        expected_error(Source.MOCKED, device),
    ]
    assert errors == sorted(errors)
    assert len(set(errors)) == 4
