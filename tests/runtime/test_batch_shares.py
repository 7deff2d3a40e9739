"""Replicas that take uneven shares of each microbatch: gradients are those of the mean over all samples."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import Case
from runtime_documents import plan_of, profile_of
from runtime_models import TinyModel
from test_schedules import assert_equal_to_one_process

from stagewright.modeling import split
from stagewright.runtime.topology import Part, Topology

pytestmark = pytest.mark.ranks

CASES = [
    Case("1f1b", 2, 4, shares=((1, 3), (1, 3)), reference_microbatch=4, dropout=0.0),
    Case("zb-h1", 2, 3, shares=((3, 1), (2, 2)), reference_microbatch=4, dropout=0.0, dtype="float64", clip_norm=0.05),
    Case("gpipe", 2, 3, shares=((1, 2), (3,)), reference_microbatch=3, dropout=0.0, dtype="float64", tied=False),
    Case("1f1b", 1, 4, shares=((2, 1),), degrees={"tp": 2, "zero": 2}, reference_microbatch=3, dropout=0.0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.schedule}-{case.shares}")
def test_replicas_with_shares_of_their_own_equal_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


def test_stages_of_other_shares_exchange_the_samples_that_they_have_in_common():
    chain = split(TinyModel(3))
    plan = plan_of(chain, profile_of(chain), "1f1b", 2, 4, shares=((3, 1), (2, 2)))
    assert plan.job.global_batch == 16
    assert Topology(plan, 0).parts(0, 1) == (Part(2, 0, 2), Part(3, 2, 1))
    assert Topology(plan, 1).parts(0, 1) == (Part(3, 0, 1),)
    assert Topology(plan, 3).parts(0, 0) == (Part(0, 0, 1), Part(1, 1, 1))
    assert [Topology(plan, rank).num_samples for rank in range(4)] == [3, 1, 2, 2]
