"""Stages that divide sequences, or experts, unlike: what travels is cut into pieces and put together in its places."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

pytest.importorskip("torch")
from runtime_cases import LENGTH, Case, make_model, prepare
from runtime_documents import profile_of
from runtime_models import hugging_face
from test_schedules import assert_equal_to_one_process

from stagewright.modeling import split
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.models.hugging_face import profile_from_config
from stagewright.planner.prediction import evaluate
from stagewright.runtime.run import run_plan
from stagewright.runtime.support import check_supported
from stagewright.runtime.topology import Part, Topology

pytestmark = pytest.mark.ranks

EXACT = {"dropout": 0.0, "dtype": "float64"}
REPLICAS, PARTS = {"dp": 2}, {"dp": 1, "cp": 2}
TWO_BY_TWO = {"degrees": REPLICAS, "num_blocks": 4, **EXACT}
STRIPED, ZIGZAG = ({"context_layout": layout} for layout in ("striped", "zigzag"))
CASES = [
    Case("1f1b", 2, 4, by_stage=({}, PARTS), **TWO_BY_TWO),
    Case("1f1b", 2, 3, by_stage=(PARTS, {}), clip_norm=0.05, parameters=ZIGZAG, **TWO_BY_TWO),
    Case("zb-h1", 2, 4, by_stage=({"zero": 1}, PARTS), parameters=STRIPED, tied=False, **TWO_BY_TWO),
    Case("zb-h1", 2, 4, by_stage=({**PARTS, "zero": 2}, {"zero": 3}), tied=False, **TWO_BY_TWO),
    Case("interleaved", 2, 4, num_chunks=2, by_stage=({}, PARTS) * 2, parameters=ZIGZAG, tied=False, **TWO_BY_TWO),
    Case("interleaved", 2, 4, num_chunks=2, by_stage=(PARTS, {}) * 2, **TWO_BY_TWO),
    Case("1f1b", 2, 4, replicas=(1, 2), by_stage=({}, PARTS), num_blocks=4, **EXACT),
    Case("zb-h1", 2, 4, replicas=(2, 1), by_stage=({**PARTS, "zero": 2}, {}), parameters=ZIGZAG, tied=False, **EXACT),
    Case("1f1b", 2, 3, by_stage=({"dp": 1, "tp": 2, "sp": True}, PARTS), **{**TWO_BY_TWO, "tied": False}),
    Case("1f1b", 2, 3, by_stage=(PARTS, {"dp": 1, "tp": 2}), parameters=ZIGZAG, **{**TWO_BY_TWO, "tied": False}),
]
EXPERTS = [
    Case("1f1b", 2, 3, by_stage=({"ep": 2}, PARTS), num_choices=2, **TWO_BY_TWO),
    Case("zb-h1", 2, 4, by_stage=({"zero": 2}, {**PARTS, "ep": 2, "zero": 2}), num_choices=2, tied=False, **TWO_BY_TWO),
    Case("1f1b", 2, 3, by_stage=({"etp": 2}, {"ep": 2}), num_choices=2, **TWO_BY_TWO),
    Case(
        "interleaved",
        2,
        4,
        num_chunks=2,
        by_stage=({"ep": 2}, {"dp": 1, "tp": 2}) * 2,
        num_choices=2,
        tied=False,
        **TWO_BY_TWO,
    ),
]


def case_id(case: Case) -> str:
    return f"{case.schedule}-{case.by_stage}-{case.parameters.get('context_layout', '')}"


@pytest.mark.parametrize("case", [*CASES, *EXPERTS], ids=case_id)
def test_stages_with_context_and_expert_degrees_of_their_own_equal_one_process(rank_pools, case):
    check_supported(prepare(case, 0).plan)
    assert_equal_to_one_process(rank_pools, case)


def choices(world: int) -> list[dict[str, object]]:
    """Data, tensor and context degrees on so many devices, with and without what they may have beside them."""
    found: list[dict[str, object]] = []
    for tp, cp in product((1, 2, 4), repeat=2):
        if world % (tp * cp) == 0:
            own = {"dp": world // (tp * cp), "tp": tp, "cp": cp}
            found += [own, {**own, "zero": 2 if own["dp"] * cp > 1 else 0, "sp": tp > 1}]
            found += [{**own, "ulysses": 2}] if cp > 1 else []
    return found


@pytest.mark.soak
@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved"])
@pytest.mark.parametrize(("first", "second"), list(product(choices(2), repeat=2)), ids=str)
def test_every_pair_of_degrees_equals_one_process(rank_pools, schedule, layout, first, second):
    chunks = 2 if schedule == "interleaved" else None
    case = Case(
        schedule,
        2,
        4,
        num_chunks=chunks,
        by_stage=(first, second) * (chunks or 1),
        parameters={"context_layout": layout},
        tied=False,
        **{name: value for name, value in TWO_BY_TWO.items() if name != "tied"},
    )
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_device_receives_once_what_it_works_on(rank_pools, case):
    case = replace(case, dtype="float32")
    pool = rank_pools(case.world)
    prepared = prepare(case, pool.next_number())
    profile = profile_of(
        split(make_model(case, 2 * (case.num_chunks or 2))),
        sequence_length=LENGTH,
        output_bytes=LENGTH * case.width * 4.0,
        tensor_degrees=(1, 2),
    )
    predicted = evaluate(prepared.plan, profile).prediction.link_bytes
    results = pool.run("degree_cases.sent_in_a_step", prepared)
    for name in ("send-receive/pp", "all-reduce/tied"):
        assert sum(sent.get(name, 0.0) for sent in results) == pytest.approx(predicted.get(name, 0.0), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "by_stage"),
    [
        ("llama", ({}, PARTS)),
        ("llama", ({**PARTS, "ulysses": 2}, {"dp": 1, "tp": 2, "sp": True})),
        ("mixtral", ({"ep": 2}, PARTS)),
        ("mixtral", ({**PARTS, "zero": 2}, {"ep": 2, "zero": 2})),
    ],
    ids=str,
)
def test_real_models_equal_one_process_and_send_what_is_predicted_to_the_byte(rank_pools, name, by_stage):
    """Tokens that all choose the same experts make the exchange with these known."""
    pytest.importorskip("transformers")
    dtype = "float32" if name == "mixtral" else "float64"  # torch groups matrix products up to 32 bits
    exact = {"dropout": 0.0, "dtype": dtype, "tied": False}
    count = 4 // by_stage[0].get("dp", 2)
    case = Case(
        "1f1b", 2, count, degrees=REPLICAS, by_stage=by_stage, hugging_face=name, reference_microbatch=8, **exact
    )
    assert_equal_to_one_process(rank_pools, case)
    pool = rank_pools(case.world)
    prepared = prepare(replace(case, dtype="float32"), pool.next_number())
    profile = profile_from_config(hugging_face(name)[0].config.to_dict(), name)
    plan = prepared.plan.model_copy(update={"layer_digest": profile.layer_digest})
    predicted = evaluate(plan, profile).prediction.link_bytes
    function = "sent_with_equal_choices" if name == "mixtral" else "sent_in_a_step"
    results = pool.run(f"degree_cases.{function}", prepared)
    measured = {name: sum(sent.get(name, 0.0) for sent in results) for sent in results for name in sent}
    assert {name: value for name, value in measured.items() if value} == pytest.approx(predicted, rel=1e-9)


def test_a_device_gives_every_other_one_the_pieces_that_both_have():
    """Replicas 0 and 1 have whole sequences; of four pieces, devices 2 and 3 have those of either end and those between."""
    plan = prepare(CASES[0], 0).plan
    plan = plan.model_copy(update={"schedule": plan.schedule.model_copy(update={"parameters": ZIGZAG})})
    assert Topology(plan, 0).takers(0, 1) == (Part(2, 0, 2, (0, 3), 4), Part(3, 0, 2, (1, 2), 4))
    assert Topology(plan, 3).parts(0, 0) == (Part(0, 0, 2, (0, 1), 2), Part(1, 2, 2, (0, 1), 2))
    striped = plan.model_copy(update={"schedule": plan.schedule.model_copy(update={"parameters": STRIPED})})
    assert Topology(striped, 1).takers(0, 1)[1] == Part(3, 0, 2, (1, 3, 5, 7), 8)


def test_what_the_runtime_does_not_take_is_refused_by_name():
    mixed = Case("interleaved", 2, 4, num_chunks=2, by_stage=({}, {}, PARTS, {}), **TWO_BY_TWO)
    with pytest.raises(InvalidArgument, match=r"stages \[0, 2\] stand on pipeline rank 0, with \(dp, tp, sp, cp"):
        check_supported(prepare(mixed, 0).plan)
    both_ways = Case("gems", 2, 4, by_stage=({}, PARTS), **TWO_BY_TWO)
    with pytest.raises(InvalidArgument, match=r"stages \[0, 1\] stand on pipeline rank 0"):
        check_supported(prepare(both_ways, 0).plan)
    sliced = Case("seq1f1b", 2, 4, num_slices=2, by_stage=({}, {"dp": 1, "tp": 2}), **TWO_BY_TWO)
    with pytest.raises(InvalidArgument, match=r"seq1f1b has edges .* and 2 slices"):
        check_supported(prepare(sliced, 0).plan)
    plan = prepare(CASES[0], 0).plan
    odd = plan.model_copy(update={"job": plan.job.model_copy(update={"sequence_length": 7})})
    with pytest.raises(InvalidArgument, match="a sequence of 7 does not divide into 2 parts"):
        check_supported(odd)
    profile = profile_of(split(make_model(CASES[0], 4)))
    with pytest.raises(InvalidArgument, match=r"and cp \[1, 2\], an emulated or replayed run takes equal ones"):
        run_plan(plan, profile, model="nothing:imported", emulate=True)
