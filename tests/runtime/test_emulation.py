"""An emulated run keeps the simulated order and sends the predicted bytes, whatever the model costs."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_documents import plan_of, profile_of
from runtime_models import TinyModel

from stagewright.modeling import split
from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.run import run_plan

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    ("schedule", "num_ranks", "num_microbatches"),
    [("1f1b", 2, 4), pytest.param("bpipe", 4, 8, marks=pytest.mark.soak)],
)
def test_an_emulated_run_takes_at_least_the_simulated_time_and_sends_the_predicted_bytes(
    schedule, num_ranks, num_microbatches
):
    chain = split(TinyModel(6, tied=False))
    profile = profile_of(chain)
    plan = plan_of(chain, profile, schedule, num_ranks, num_microbatches)
    report = run_plan(plan, profile, model="nothing:imported", steps=2, emulate=True)
    simulated, measured = report.predicted_timeline.makespan_s, report.timeline.makespan_s
    assert simulated * 0.999 <= measured
    assert report.checks["traffic"]["passed"], report.checks["traffic"]
    assert set(report.checks) == {"traffic", "time"}
    path = report.checks["time"]["critical_path"]
    assert path["actions"] >= 4
    assert path["predicted_s"] * 0.99 <= path["measured_s"]


def test_a_run_is_replayed_or_emulated_and_not_both():
    chain = split(TinyModel(3))
    profile = profile_of(chain)
    with pytest.raises(InvalidArgument, match="not both"):
        run_plan(plan_of(chain, profile, "1f1b", 2, 4), profile, model="m:f", replay="0", emulate=True)
