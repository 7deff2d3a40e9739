"""Replicas that meet every H steps follow the recurrence of DiLoCo and send 1 / H of what data parallelism sends."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from rank_pool import RankError
from runtime_cases import LENGTH, Case, make_model, prepare
from runtime_documents import profile_of

from stagewright.modeling import split
from stagewright.planner.prediction import evaluate

pytestmark = pytest.mark.ranks

NUM_PARAMETERS = 7312 + 36 * 16


@pytest.mark.parametrize(("every", "zero"), [(1, 0), (2, 1), (3, 0)])
def test_local_steps_with_an_outer_nesterov_step_follow_the_recurrence(rank_pools, every, zero):
    pool = rank_pools(4)
    case = Case(
        "1f1b",
        2,
        3,
        degrees={"dp": 2, "zero": zero},
        dropout=0.0,
        dtype="float64",
        tied=False,
        num_steps=6,
        parameters={"local_steps": every},
    )
    prepared = prepare(case, pool.next_number())
    results = pool.run("degree_cases.local_steps", prepared)
    assert max(error for error, _ in results) <= 1e-10
    all_reduce = 2 * (2 - 1) * NUM_PARAMETERS * 8  # over both replicas of every stage
    assert sum(sent for _, sent in results) == all_reduce * 6 / every
    profile = profile_of(split(make_model(case, 4)), sequence_length=LENGTH)
    assert evaluate(prepared.plan, profile).prediction.link_bytes["all-reduce/outer"] == all_reduce / every


def test_replicas_that_need_each_other_inside_a_step_are_refused(rank_pools):
    pool = rank_pools(4)
    case = Case("gpipe", 1, 2, degrees={"dp": 4, "ep": 2}, dropout=0.0, num_choices=1, parameters={"local_steps": 2})
    with pytest.raises(RankError, match="local_steps is 2 with ep 2, etp 1"):
        pool.run("degree_cases.local_steps", prepare(case, pool.next_number()))
