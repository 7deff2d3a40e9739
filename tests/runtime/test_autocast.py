"""Matrix products in bf16 over fp32 weights, gradients and states: as one process does under the same policy."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, prepare
from runtime_documents import plan_of, profile_of
from runtime_models import TinyModel
from test_schedules import assert_equal_to_one_process

from stagewright.modeling import split
from stagewright.planner.documents import Degrees
from stagewright.planner.errors import InvalidArgument
from stagewright.runtime.support import check_supported

pytestmark = pytest.mark.ranks

BF16 = {"autocast": "bf16"}
CASES = [
    Case("1f1b", 2, 4, degrees={"dp": 2}, parameters=BF16),
    Case("zb-h1", 2, 4, degrees={"dp": 2, "zero": 1}, parameters=BF16, recompute=("full", "selective", "none")),
    Case("1f1b", 2, 4, degrees={"dp": 2, "zero": 3}, parameters=BF16, dropout=0.0),
    Case("zb-v", 4, 8, parameters=BF16, tied=False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.schedule}-{case.degrees}")
def test_a_pipeline_in_mixed_precision_equals_one_process_in_the_same(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.parametrize(
    "case",
    [
        Case("1f1b", 1, 2, degrees={"cp": 4}, parameters=BF16, dropout=0.0),
        Case("1f1b", 2, 4, degrees={"cp": 2, "ulysses": 2}, parameters=BF16, dropout=0.0, recompute=("full",)),
        Case("seq1f1b", 4, 4, num_slices=2, parameters=BF16, dropout=0.0, tied=False),
        Case("1f1b", 2, 4, degrees={"tp": 2, "vocab_parallel": True}, parameters=BF16, dropout=0.0),
    ],
    ids=lambda case: f"{case.schedule}-{case.degrees}",
)
def test_divided_sequences_and_a_divided_loss_in_mixed_precision_differ_by_the_rounding_of_bf16(rank_pools, case):
    pool = rank_pools(4)
    found = pool.run("gradients_and_weights", prepare(case, pool.next_number()))
    assert 1e-5 < max(each.gradients.max_relative_error for each in found) < 5e-2


def test_split_tensors_in_mixed_precision_differ_by_the_rounding_of_bf16_and_the_loss_from_that_in_fp32(
    rank_pools,
):
    pool = rank_pools(4)
    sizes = {"degrees": {"tp": 2, "sp": True}, "dropout": 0.0}
    mixed = pool.run("gradients_and_weights", prepare(Case("1f1b", 2, 4, parameters=BF16, **sizes), pool.next_number()))
    whole = pool.run("gradients_and_weights", prepare(Case("1f1b", 2, 4, **sizes), pool.next_number()))
    assert 1e-5 < mixed[0].gradients.max_relative_error < 5e-2
    assert whole[0].gradients.max_relative_error < 1e-5
    loss, other = (sum(each.loss or 0.0 for each in results) for results in (mixed, whole))
    assert 1e-6 < abs(loss / other - 1) < 1e-2


@pytest.mark.parametrize(
    ("precision", "degrees", "message"),
    [
        ("fp64", {}, "autocast is bf16 with weights in fp64"),
        ("bf16", {"cp": 2}, "autocast is bf16 with weights in bf16"),
    ],
)
def test_mixed_precision_that_does_not_run_is_refused(precision, degrees, message):
    chain = split(TinyModel(3))
    plan = plan_of(
        chain, profile_of(chain), "1f1b", 2, 4, degrees=Degrees(**degrees), precision=precision, parameters=BF16
    )
    with pytest.raises(InvalidArgument, match=message):
        check_supported(plan)
