"""Stages of different tensor degrees, as plans on mixed clusters have them: what travels is divided and put together."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import LENGTH, Case, make_model, prepare
from runtime_documents import profile_of
from test_schedules import assert_equal_to_one_process

from stagewright.modeling import split
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.prediction import evaluate
from stagewright.runtime.support import check_shared_weights
from stagewright.runtime.topology import Part, Topology

pytestmark = pytest.mark.ranks

EXACT = {"dropout": 0.0, "dtype": "float64"}
TWO_BY_TWO = {"degrees": {"tp": 2}, "num_blocks": 4, "tied": False, **EXACT}
CASES = [
    Case("1f1b", 2, 4, by_stage=({}, {"tp": 1, "dp": 2}), **TWO_BY_TWO),
    Case("zb-h1", 2, 4, by_stage=({"tp": 1, "dp": 2, "zero": 1}, {"sp": True}), microbatch=1, **TWO_BY_TWO),
    Case("1f1b", 2, 3, by_stage=({"sp": True}, {"vocab_parallel": True}), clip_norm=0.05, **TWO_BY_TWO),
    Case(
        "gpipe", 2, 3, replicas=(2, 1), by_stage=({"tp": 2, "dp": 1, "sp": True}, {}), num_blocks=4, tied=False, **EXACT
    ),
]
CASES += [  # cut behind the last block, with parts of sequences in front of the cut or wanted behind it
    Case("1f1b", 2, 3, by_stage=({"layers": (0, 5), "sp": True}, {"layers": (5, 8), "tp": 1, "dp": 2}), **TWO_BY_TWO),
    Case("1f1b", 2, 3, by_stage=({"layers": (0, 5)}, {"layers": (5, 8), "sp": True}), **TWO_BY_TWO),
]
WIDE = [
    Case(
        "1f1b",
        2,
        4,
        degrees={"tp": 4, "sp": True},
        by_stage=({"vocab_parallel": True}, {"tp": 2, "dp": 2, "zero": 2}),
        num_blocks=4,
        tied=False,
        **EXACT,
    )
]


def case_id(case: Case) -> str:
    return f"{case.schedule}-{case.by_stage}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_stages_with_tensor_degrees_of_their_own_equal_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.soak
@pytest.mark.parametrize("case", WIDE, ids=case_id)
def test_wider_stages_with_tensor_degrees_of_their_own_equal_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_device_receives_once_what_it_works_on(rank_pools, case):
    case = Case(**{**vars(case), "dtype": "float32"})
    pool = rank_pools(case.world)
    prepared = prepare(case, pool.next_number())
    profile = profile_of(
        split(make_model(case, 4)),
        sequence_length=LENGTH,
        output_bytes=LENGTH * case.width * 4.0,
        tensor_degrees=(1, 2),
    )
    predicted = evaluate(prepared.plan, profile).prediction.link_bytes["send-receive/pp"]
    results = pool.run("degree_cases.sent_in_a_step", prepared)
    assert sum(sent["send-receive/pp"] for sent in results) == pytest.approx(predicted, rel=1e-12)


def test_one_of_equal_copies_is_sent_and_each_part_of_a_sequence_by_its_owner():
    """Two devices that split sequences, two replicas that hold whole ones: both halves of a sample go to its replica."""
    plan = prepare(CASES[1], 0).plan  # replicas 0 and 1, tensor-parallel devices 2 and 3
    first, second = (0,), (1,)  # of the two pieces of a sequence
    assert Topology(plan, 0).takers(0, 1, is_split=True) == (Part(2, 0, 1, first, 2), Part(3, 0, 1, second, 2))
    assert Topology(plan, 3).takers(0, 0, is_split=True) == (Part(0, 0, 1), Part(1, 1, 1))
    assert Topology(plan, 3).takers(0, 0) == ()
    assert Topology(plan, 2).takers(0, 0) == (Part(0, 0, 1, (0, 1), 2), Part(1, 1, 1, (0, 1), 2))
    assert Topology(plan, 3).parts(0, 0) == (Part(0, 0, 1, (0, 1), 2), Part(1, 1, 1, (0, 1), 2))


def test_what_the_runtime_does_not_take_is_refused_by_name():
    tied = Case(**{**vars(CASES[0]), "tied": True})
    profile = profile_of(split(make_model(tied, 4)))
    with pytest.raises(InvalidArgument, match=r"share a weight, with \(tp, vocab_parallel\)"):
        check_shared_weights(prepare(tied, 0).plan, profile)
