"""What the ranks send in one step is what the plan predicts, to the byte."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import LENGTH, Case, make_model, prepare
from runtime_documents import profile_of
from runtime_models import hugging_face

from stagewright.modeling import split
from stagewright.planner.models.hugging_face import profile_from_config
from stagewright.planner.prediction import evaluate

pytestmark = pytest.mark.ranks

BOUNDARY_BYTES = LENGTH * 16 * 4.0  # of one sample

CASES = [
    Case("1f1b", 2, 3, degrees={"dp": 2}),
    Case("1f1b", 4, 4),
    Case("interleaved", 2, 4, num_chunks=2, degrees={"dp": 2}, tied=False),
    Case("1f1b", 2, 3, degrees={"dp": 2, "zero": 1}),
    Case("1f1b", 2, 3, degrees={"dp": 2, "zero": 2}),
    Case("1f1b", 2, 3, degrees={"dp": 2, "zero": 3}),
    Case("gpipe", 1, 2, degrees={"dp": 4, "zero": 2}),
    Case("gpipe", 1, 2, degrees={"dp": 4, "zero": 3}, parameters={"shard_size": 2}),
    Case("zb-h1", 2, 4, degrees={"dp": 2, "zero": 3}, tied=False),
    Case("breadth-first", 2, 4, num_chunks=2, degrees={"dp": 2, "zero": 3}, parameters={"gather": "run"}),
    Case("dualpipe-v", 2, 4, degrees={"dp": 2, "zero": 2}),
    Case("gems", 2, 4, degrees={"dp": 2}),
    Case("gems", 2, 4, degrees={"dp": 2, "zero": 2}, tied=False),
    Case("chimera", 4, 4, tied=False),
    Case("seq1f1b", 2, 2, num_slices=2, degrees={"dp": 2, "zero": 2}),
    Case("1f1b", 3, 4, replicas=(2, 1, 1), tied=False),
    Case("1f1b", 2, 4, shares=((3, 1), (2, 2)), degrees={"zero": 1}, reference_microbatch=4),
    Case("pipedream", 4, 6, parameters={"replicas": "3,1"}, tied=False),
    Case("1f1b", 2, 4, degrees={"dp": 2}, by_stage=({"zero": 3}, {"zero": 1}), tied=False),
    Case(
        "1f1b",
        2,
        3,
        degrees={"dp": 2, "zero": 1},
        by_stage=({"state_shares": (0.7, 0.3)}, {"state_shares": (0.1, 0.9)}),
    ),
    Case("gpipe", 1, 2, degrees={"dp": 4, "zero": 3}, by_stage=({"state_shares": (0.5, 0.25, 0.15, 0.1)},)),
    Case("interleaved", 2, 4, degrees={"dp": 2}, by_stage=tuple({"zero": zero} for zero in (2, 0, 3, 1)), tied=False),
    Case("1f1b", 2, 3, degrees={"dp": 2}, dtype="bfloat16"),
    Case("gpipe", 1, 3, degrees={"dp": 2, "zero": 1}, dtype="bfloat16"),
    Case("gpipe", 1, 2, degrees={"dp": 4, "zero": 3}, dtype="bfloat16"),
    Case("gpipe", 1, 2, degrees={"dp": 4, "zero": 1}, parameters={"shard_size": 2}, dtype="bfloat16"),
]


def case_id(case: Case) -> str:
    return f"{case.schedule}-{case.num_ranks}-{case.degrees}-{case.tied}-{case.parameters}{case.replicas or ''}{case.shares or ''}{case.by_stage or ''}{case.dtype}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bytes_sent_are_the_predicted_ones(rank_pools, case):
    pool = rank_pools(case.world)
    case = Case(**{**vars(case), "dropout": 0.0})
    prepared = prepare(case, pool.next_number())
    chunks = case.num_chunks or (2 * case.num_waves if case.num_waves else 2)
    chain = split(make_model(case, case.num_ranks * chunks))
    width = 0.5 if case.dtype == "bfloat16" else 1.0
    profile = profile_of(chain, sequence_length=LENGTH, output_bytes=width * BOUNDARY_BYTES)
    predicted = evaluate(prepared.plan, profile).prediction.link_bytes
    results = pool.run("degree_cases.sent_in_a_step", prepared)
    measured = {name: sum(sent.get(name, 0.0) for sent in results) for sent in results for name in sent}
    assert {name: value for name, value in measured.items() if value} == pytest.approx(predicted, rel=1e-9)


SPLIT = [
    {"tp": 2},
    {"tp": 2, "sp": True},
    {"tp": 2, "vocab_parallel": True},
    {"tp": 2, "sp": True, "vocab_parallel": True},
    {"cp": 2},
    {"cp": 4},
    {"cp": 2, "ulysses": 2},
    {"cp": 4, "ulysses": 2},
    {"tp": 2, "sp": True, "dp": 2, "zero": 2},
    {"tp": 4, "sp": True},  # two key-value heads
]


RECOMPUTED = [{"tp": 2}, {"tp": 2, "sp": True}, {"cp": 2}, {"cp": 2, "ulysses": 2}]


@pytest.mark.parametrize(
    ("degrees", "recompute"),
    [*((each, "none") for each in SPLIT), *((each, "full") for each in RECOMPUTED), ({"cp": 2}, "selective")],
    ids=str,
)
def test_collectives_inside_the_layers_of_a_llama_are_the_predicted_ones(rank_pools, degrees, recompute):
    pytest.importorskip("transformers")
    num_layers = profile_from_config(hugging_face("llama")[0].config.to_dict(), "llama").num_layers
    levels = ("none", *[recompute] * (num_layers - 4), "none", "none", "none")  # embedding and the tail offer no level
    case = Case(
        "gpipe", 1, 4 // degrees.get("dp", 1), degrees=degrees, dropout=0.0, hugging_face="llama", recompute=levels
    )  # fmt: skip
    pool = rank_pools(case.world)
    prepared = prepare(case, pool.next_number())
    profile = profile_from_config(hugging_face("llama")[0].config.to_dict(), "llama")
    assert profile.num_layers == prepared.plan.num_layers
    plan = prepared.plan.model_copy(update={"layer_digest": profile.layer_digest})
    predicted = evaluate(plan, profile).prediction.link_bytes
    results = pool.run("degree_cases.sent_in_a_step", prepared)
    measured = {name: sum(sent.get(name, 0.0) for sent in results) for sent in results for name in sent}
    assert {name: value for name, value in measured.items() if value} == pytest.approx(predicted, rel=1e-9)


@pytest.mark.parametrize(
    ("recompute", "degrees"),
    [
        ("none", {"dp": 2, "ep": 2}),
        ("full", {"dp": 2, "ep": 2}),
        ("none", {"tp": 2, "ep": 2}),  # gradients of routing weights were left out
        ("none", {"dp": 4, "ep": 2, "zero": 2}),
        ("none", {"dp": 4, "ep": 2, "zero": 3}),
    ],
    ids=str,
)
def test_the_exchange_with_the_experts_of_a_mixtral_is_the_predicted_one_when_all_tokens_choose_alike(
    rank_pools, recompute, degrees
):
    """Whatever experts they choose: of two ranks with as many tokens, one keeps its own and the other sends its own."""
    predicted, measured = bytes_of_a_mixtral(rank_pools, recompute, degrees, "degree_cases.sent_with_equal_choices")
    assert predicted["all-to-all/ep"] > 0
    assert measured == pytest.approx(predicted, rel=1e-9)


@pytest.mark.parametrize("degrees", [{"tp": 2, "sp": True}, {"dp": 2, "tp": 2, "sp": True, "zero": 2}], ids=str)
def test_gradients_of_experts_that_nothing_divides_are_summed_over_the_parts_of_a_sequence(rank_pools, degrees):
    """The bytes of experts were left out: a random plan of a Mixtral sent 23 times what was predicted."""
    predicted, measured = bytes_of_a_mixtral(rank_pools, "none", degrees, "degree_cases.sent_in_a_step")
    assert measured == pytest.approx(predicted, rel=1e-9)


def bytes_of_a_mixtral(rank_pools, recompute, degrees, work):
    """Return what a step of a small Mixtral is predicted to send, and what it sends."""
    pytest.importorskip("transformers")
    profile = profile_from_config(hugging_face("mixtral")[0].config.to_dict(), "mixtral")
    levels = ("none", *[recompute] * (profile.num_layers - 4), "none", "none", "none")
    num_microbatches = 4 // degrees.get("dp", 1)
    case = Case("gpipe", 1, num_microbatches, degrees=degrees, dropout=0.0, hugging_face="mixtral", recompute=levels)
    pool = rank_pools(case.world)
    prepared = prepare(case, pool.next_number())
    plan = prepared.plan.model_copy(update={"layer_digest": profile.layer_digest})
    predicted = evaluate(plan, profile).prediction.link_bytes
    results = pool.run(work, prepared)
    measured = {name: sum(sent.get(name, 0.0) for sent in results) for sent in results for name in sent}
    return predicted, {name: value for name, value in measured.items() if value}
