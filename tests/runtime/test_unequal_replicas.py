"""Stages of different numbers of replicas (DAPPLE): microbatches are split and put together between them."""

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
    Case("1f1b", 2, 4, replicas=(1, 3), microbatch=3, dropout=0.0),
    Case("zb-h1", 2, 4, replicas=(3, 1), microbatch=1, dropout=0.0, dtype="float64", clip_norm=0.05),
    Case("gpipe", 3, 3, replicas=(1, 2, 1), dropout=0.0, dtype="float64", degrees={"zero": 1}, tied=False),
    Case("1f1b", 3, 5, replicas=(2, 1, 1), dropout=0.0, recompute=("full",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.schedule}-{case.replicas}")
def test_stages_with_replicas_of_their_own_equal_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


def test_two_and_three_replicas_exchange_the_samples_that_they_share():
    chain = split(TinyModel(3))
    plan = plan_of(chain, profile_of(chain), "1f1b", 2, 4, microbatch=3, replicas=(2, 3))
    assert Topology(plan, 0).parts(0, 1) == (Part(2, 0, 2), Part(3, 2, 1))
    assert Topology(plan, 1).parts(0, 1) == (Part(3, 0, 1), Part(4, 1, 2))
    assert Topology(plan, 3).parts(0, 0) == (Part(0, 0, 1), Part(1, 1, 1))
    assert Topology(plan, 3).parts(0, 1) == (Part(3, 0, 2),)
