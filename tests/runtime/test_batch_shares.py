"""Replicas that take uneven shares of each microbatch: gradients are those of the mean over all samples."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import LENGTH, Case, make_model, prepare
from runtime_documents import plan_of, profile_of
from runtime_models import TinyModel
from test_schedules import assert_equal_to_one_process

from stagewright.modeling import split
from stagewright.planner.expectation import peaks_by_device
from stagewright.planner.prediction import evaluate
from stagewright.runtime.topology import Part, Topology

pytestmark = pytest.mark.ranks

CASES = [
    Case("1f1b", 2, 4, shares=((1, 3), (1, 3)), reference_microbatch=4, dropout=0.0),
    Case("zb-h1", 2, 3, shares=((3, 1), (2, 2)), reference_microbatch=4, dropout=0.0, dtype="float64", clip_norm=0.05),
    Case("gpipe", 2, 3, shares=((1, 2), (3,)), reference_microbatch=3, dropout=0.0, dtype="float64", tied=False),
    Case("1f1b", 1, 4, shares=((2, 1),), degrees={"tp": 2, "zero": 2}, reference_microbatch=3, dropout=0.0),
]


HALVES = {"state_shares": (0.5, 0.5)}
STATES = [
    Case(
        "1f1b",
        2,
        4,
        by_stage=({"state_shares": (0.7, 0.3)}, {"state_shares": (0.1, 0.9)}),
        degrees={"dp": 2, "zero": 1},
    ),
    Case("gpipe", 1, 2, by_stage=({"state_shares": (0.5, 0.25, 0.15, 0.1)},), degrees={"dp": 4, "zero": 3}, tied=False),
    Case(
        "zb-h1",
        2,
        3,
        by_stage=({"state_shares": (0.8, 0.2), "zero": 2}, HALVES),
        degrees={"dp": 2, "zero": 1},
        clip_norm=0.05,
    ),
    Case(
        "1f1b",
        1,
        4,
        shares=((3, 1),),
        by_stage=({"state_shares": (0.25, 0.75), "optimizer_offload": 0.5},),
        degrees={"zero": 2},
        reference_microbatch=4,
        dropout=0.0,
    ),
    Case(
        "gpipe",
        1,
        2,
        by_stage=({"state_shares": (0.75, 0.25)},),
        degrees={"dp": 2, "cp": 2, "zero": 2},
        dropout=0.0,
        dtype="float64",
    ),
    Case(
        "gpipe",
        1,
        2,
        by_stage=({"state_shares": (0.6, 0.4)},),
        degrees={"dp": 2, "zero": 1},
        optimizer="muon",
        dtype="float64",
    ),
]


@pytest.mark.parametrize("case", STATES, ids=lambda case: f"{case.schedule}-{case.degrees}-{case.optimizer}")
def test_replicas_with_unlike_shares_of_states_equal_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.parametrize("cp", [1, 2])
def test_each_replica_holds_its_share_of_the_states_and_the_ledger_says_so(rank_pools, cp):
    pool = rank_pools(4)
    shares = (0.5, 0.25, 0.15, 0.1) if cp == 1 else (0.8, 0.2)
    degrees = {"dp": 4 // cp, "cp": cp, "zero": 2}
    case = Case("gpipe", 1, 2, by_stage=({"state_shares": shares},), degrees=degrees, dropout=0.0, tied=False)
    prepared = prepare(case, pool.next_number())
    profile = profile_of(split(make_model(case, 2)), sequence_length=LENGTH)
    peaks = peaks_by_device(prepared.plan, profile)
    for rank, memory in enumerate(pool.run("degree_cases.held_states", prepared)):
        states = evaluate(prepared.plan, profile, member=rank).prediction.memory[0]
        assert memory.optimizer == pytest.approx(states.optimizer, rel=0.01)
        assert memory.states == pytest.approx(states.parameters + states.gradients + states.optimizer, rel=0.01)
        assert peaks[rank] - peaks[0] == pytest.approx(
            12 * (shares[rank // cp] - shares[0]) / cp * memory.parameters / 4, rel=0.02
        )


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
