"""Predicted against measured, on runs whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
from runtime_documents import plan_of, profile_of
from runtime_models import TinyModel

from stagewright.modeling import split
from stagewright.planner.documents import Degrees
from stagewright.planner.prediction import evaluate, step_time_at
from stagewright.runtime.measurement import Measurement, probes_around
from stagewright.runtime.report import make_report


@pytest.fixture(scope="module")
def planned():
    chain = split(TinyModel(6, tied=False))
    profile = profile_of(chain)
    plan = plan_of(chain, profile, "1f1b", 2, 4)
    return plan, evaluate(plan, profile)


def test_a_step_on_ranks_of_other_speed_is_simulated_with_their_seconds(planned):
    _, evaluation = planned
    step_s = evaluation.prediction.step_time_s
    sends_s = 2 * evaluation.links.latency_s.max()  # of the first microbatch down, of the last gradient up
    assert step_time_at(evaluation, np.ones(2)) == pytest.approx(step_s, rel=1e-12)
    assert step_time_at(evaluation, np.full(2, 3.0)) == pytest.approx(3 * step_s, abs=3 * sends_s + 1e-4)
    slow_last = step_time_at(evaluation, np.array([1.0, 2.0]))
    # the last rank is never idle between its first and last action: 4 microbatches at twice the seconds, and rank 0's two ends
    work_s = evaluation.timeline.busy_s()
    assert slow_last >= 2 * work_s[1]
    assert step_s < slow_last < 2 * step_s


def test_a_slower_machine_is_told_from_a_wrong_prediction(planned):
    """A run at half the profile's speed, as predicted but for its sends; in one step the machine was faster again."""
    plan, evaluation = planned
    slowness = np.array([[2.0, 2.0]] * 4 + [[1.0, 2.0]])
    times = [step_time_at(evaluation, row) for row in slowness]
    # half of what is lost in the second step the host took altogether
    probes = slowness.copy()
    probes[1] /= 2
    measurement = Measurement(
        times, [0.0] * 5, probe_s=(probes * 0.007).tolist(), stolen_share=[0.0, 0.5, 0.0, 0.0, 0.0]
    )
    report = make_report(plan, evaluation, measurement, (), probe_s=0.007)
    assert report.error["step_time"] == pytest.approx(-0.5, abs=0.02)
    assert report.error["step_time_at_speed"] == pytest.approx(0.0, abs=1e-12)
    assert report.measured["slowness"] == pytest.approx(
        {"median": 2.0, "p20": 1.9, "p80": 2.0, "num_disturbed_steps": 1, "stolen_share": 0.1}
    )


@pytest.mark.parametrize("probe_s", [0.0, 0.007])
def test_without_probes_on_both_sides_there_is_one_error(planned, probe_s):
    plan, evaluation = planned
    measurement = Measurement(step_times_s=[evaluation.prediction.step_time_s], losses=[0.0])
    report = make_report(plan, evaluation, measurement, (), probe_s=probe_s)
    assert report.error == {"step_time": pytest.approx(0.0), "peak_memory_max": None}
    assert "slowness" not in report.measured


def test_a_steps_speed_is_that_of_the_probes_behind_it_and_behind_the_step_before():
    """Probes behind three steps on two ranks; nothing was probed before the first."""
    behind_s = [[2.0, 4.0], [4.0, 4.0], [8.0, 2.0]]
    assert probes_around(behind_s) == [[2.0, 4.0], [3.0, 4.0], [6.0, 3.0]]
    assert probes_around([]) == []


def test_what_a_profile_without_operators_cannot_tell_of_divided_sequences_is_named(planned):
    """Its messages are no error of the prediction, all others still are."""
    plan, evaluation = planned
    stages = tuple(stage.model_copy(update={"degrees": Degrees(cp=2)}) for stage in plan.stages)
    divided = plan.model_copy(update={"stages": stages})
    sent = {**evaluation.prediction.link_bytes, "send/cp": 1000.0}
    measurement = Measurement([1.0], [0.0], peak_memory_bytes=[1.0] * plan.num_devices, sent_bytes=sent)
    checks = make_report(divided, evaluation, measurement, ("memory", "traffic")).checks
    assert checks["traffic"]["passed"] and checks["traffic"]["not_predicted"] == ["send/cp"]
    assert "no operators" in checks["traffic"]["reason"] and "no operators" in checks["memory"]["reason"]
    name = next(iter(evaluation.prediction.link_bytes))
    wrong = Measurement([1.0], [0.0], sent_bytes={**sent, name: 1.0})
    assert not make_report(divided, evaluation, wrong, ("traffic",)).checks["traffic"]["passed"]
    known = evaluation.prediction.model_copy(update={"link_bytes": {**sent, "send/cp": 900.0}})
    told = make_report(divided, replace(evaluation, prediction=known), measurement, ("traffic",)).checks["traffic"]
    assert not told["passed"] and "not_predicted" not in told
