"""BPipe's evictions and loads, executed: the gradients of one process, and room on the ranks that lend."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from pathlib import Path

from runtime_cases import Case, prepare
from runtime_documents import plan_of
from runtime_models import build_wide
from test_schedules import assert_equal_to_one_process

from stagewright.modeling import split
from stagewright.planner.link_bytes import LENT
from stagewright.profiler.model_profile import profile_model
from stagewright.runtime.run import run_plan

pytestmark = pytest.mark.ranks

MODELS = Path(__file__).parent / "runtime_models.py"
DATA = f"{MODELS}:data"
CASES = [
    Case("bpipe", 4, 8),
    Case("bpipe", 4, 8, tied=False, dtype="float64", recompute=("none", "selective")),
    Case("bpipe", 2, 4, degrees={"dp": 2, "zero": 1}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.num_ranks}-{case.dtype}-{case.degrees}")
def test_lent_activations_come_back_and_gradients_equal_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


def test_the_first_rank_lends_one_of_four_microbatches_and_needs_that_much_less(rank_pools):
    pool = rank_pools(4)
    sizes = {"dropout": 0.0, "width": 128, "tied": False, "microbatch": 4}
    lent = pool.run("bytes_lent", prepare(Case("bpipe", 4, 8, **sizes), pool.next_number()))
    again = pool.run("bytes_lent", prepare(Case("bpipe", 4, 8, **sizes), pool.next_number()))
    assert lent == again and lent[0][0] > 0
    assert [each for each, _ in lent[1:]] == [0, 0, lent[0][0]], "the last rank returns what the first has lent"
    peaks = {}
    for schedule in ("1f1b", "bpipe"):
        peaks[schedule] = pool.run("peak_memory", prepare(Case(schedule, 4, 8, **sizes), pool.next_number()))
    one = lent[0][0] / lent[0][1]
    assert peaks["1f1b"][0] - peaks["bpipe"][0] >= one, "of four microbatches the first rank keeps three"
    assert peaks["bpipe"][1:3] == peaks["1f1b"][1:3], "the pair in the middle lends nothing"


@pytest.mark.soak
def test_a_profile_predicts_what_a_run_lends_within_the_error_of_its_memory():
    model = f"{MODELS}:build_wide"
    profile = profile_model(
        model, data=DATA, microbatches=(4,), sequence_length=8, device="cpu", budget_s=1.0, optimizer="sgd-momentum"
    )
    plan = plan_of(split(build_wide()), profile, "bpipe", 4, 8, microbatch=4, optimizer="sgd-momentum")
    report = run_plan(plan, profile, model=model, data=DATA, steps=2, checks=("traffic", "memory"))
    assert report.checks["traffic"]["passed"], report.checks["traffic"]
    assert report.checks["traffic"]["measured_bytes"][LENT] > 0
    assert abs(report.checks["traffic"]["relative_error"][LENT]) <= 0.03
