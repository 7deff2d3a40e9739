"""Every schedule, executed: gradients and weights are those of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
from runtime_cases import SKIP, Case, CaseResult, prepare
from runtime_models import LENGTH

from stagewright.planner.planned_schedule import schedule_of

pytestmark = pytest.mark.ranks


def assert_equal_to_one_process(pools, case: Case) -> list[CaseResult]:
    limit = 1e-10 if case.dtype == "float64" else 1e-5
    pool = pools(case.world)
    results = pool.run("gradients_and_weights", prepare(case, pool.next_number()))
    for result in results:
        assert result.gradients.max_relative_error <= limit, result
        assert result.weights.max_relative_error <= limit, result.weights
        assert result.num_live == 0
    assert sum(result.loss or 0.0 for result in results) == pytest.approx(results[0].reference_loss, rel=1e-5)
    return results


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "naive", "dapple-pb"])
def test_pipelines_with_data_parallel_replicas_equal_one_process(rank_pools, schedule, dtype):
    microbatches = 1 if schedule == "naive" else 4
    assert_equal_to_one_process(rank_pools, Case(schedule, 2, microbatches, degrees={"dp": 2}, dtype=dtype))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_pipelines_equal_one_process(rank_pools, schedule):
    assert_equal_to_one_process(rank_pools, Case(schedule, 2, 5))
    assert_equal_to_one_process(rank_pools, Case(schedule, 4, 3, tied=False))


SINGLE = [
    ("interleaved", {"num_chunks": 2}),
    ("breadth-first", {"num_chunks": 2}),
    ("gems", {}),
    ("dualpipe", {}),
    ("dualpipe-v", {}),
    ("chimera", {}),
    ("zb-h1", {}),
    ("zb-h2", {}),
    ("zb-v", {}),
    ("v-min", {}),
    ("v-half", {}),
    ("interleaved-zb", {"num_chunks": 2}),
    ("wave", {"num_waves": 1}),
]


@pytest.mark.parametrize(("schedule", "sizes"), SINGLE, ids=[name for name, _ in SINGLE])
def test_schedules_with_chunks_replicas_and_split_backwards_equal_one_process(rank_pools, schedule, sizes):
    from stagewright.planner.schedules.registry import families

    if schedule not in {family.name for family in families()}:
        pytest.skip(f"{schedule} is not in the registry")
    assert_equal_to_one_process(rank_pools, Case(schedule, 4, 8, **sizes))


@pytest.mark.parametrize("schedule", ["terapipe", "seq1f1b"])
def test_sequence_slices_with_a_key_value_cache_equal_one_process(rank_pools, schedule):
    assert_equal_to_one_process(rank_pools, Case(schedule, 2, 3, num_slices=4, dropout=0.0))
    assert_equal_to_one_process(rank_pools, Case(schedule, 4, 2, num_slices=3, dropout=0.0, dtype="float64"))


@pytest.mark.parametrize(
    "levels", [("full",), ("selective",), ("none", "full", "selective")], ids=lambda x: "-".join(x)
)
def test_recomputation_replays_dropout(rank_pools, levels):
    assert_equal_to_one_process(rank_pools, Case("1f1b", 2, 4, recompute=levels))
    assert_equal_to_one_process(rank_pools, Case("dualpipe-v", 2, 4, recompute=levels, dtype="float64"))
    assert_equal_to_one_process(rank_pools, Case("seq1f1b", 2, 3, num_slices=4, dropout=0.0, recompute=levels))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_sharded_states_step_as_whole_ones(rank_pools, zero):
    degrees = {"dp": 2, "zero": zero}
    assert_equal_to_one_process(rank_pools, Case("1f1b", 2, 3, degrees=degrees))
    assert_equal_to_one_process(rank_pools, Case("gpipe", 1, 4, degrees={"dp": 4, "zero": zero}, dtype="float64"))
    assert_equal_to_one_process(rank_pools, Case("dualpipe-v", 2, 4, degrees=degrees, recompute=("full",)))
    assert_equal_to_one_process(rank_pools, Case("gems", 2, 4, degrees=degrees, tied=False))


@pytest.mark.parametrize(
    "options", [{}, {"sp": True}, {"vocab_parallel": True}, {"sp": True, "vocab_parallel": True}], ids=str
)
def test_tensor_parallelism_equals_one_process(rank_pools, options):
    degrees = {"tp": 2, **options}
    assert_equal_to_one_process(rank_pools, Case("gpipe", 1, 2, degrees=degrees, dropout=0.0))
    assert_equal_to_one_process(rank_pools, Case("1f1b", 2, 3, degrees=degrees, dropout=0.0))
    assert_equal_to_one_process(
        rank_pools, Case("zb-h1", 2, 3, degrees=degrees, dropout=0.0, dtype="float64", tied=False, recompute=("full",))
    )


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_ring_attention_equals_one_process(rank_pools, layout):
    parameters = {"context_layout": layout}
    degrees = {"cp": 2}
    assert_equal_to_one_process(rank_pools, Case("gpipe", 1, 2, degrees=degrees, dropout=0.0, parameters=parameters))
    assert_equal_to_one_process(
        rank_pools, Case("1f1b", 2, 3, degrees=degrees, dropout=0.0, parameters=parameters, dtype="float64")
    )


@pytest.mark.parametrize("ulysses", [2, 4])
def test_ulysses_and_its_product_with_the_ring_equal_one_process(rank_pools, ulysses):
    degrees = {"cp": 4, "ulysses": ulysses}
    assert_equal_to_one_process(rank_pools, Case("gpipe", 1, 2, degrees=degrees, dropout=0.0))
    assert_equal_to_one_process(
        rank_pools, Case("gpipe", 1, 2, degrees=degrees, dropout=0.0, dtype="float64", recompute=("full", "selective"))
    )


PRODUCTS = [
    {"dp": 2, "tp": 2},
    {"dp": 2, "tp": 2, "sp": True, "zero": 1},
    {"dp": 2, "tp": 2, "vocab_parallel": True, "zero": 2},
    {"tp": 2, "cp": 2},
    {"dp": 2, "cp": 2, "zero": 3},
    {"dp": 2, "tp": 2, "sp": True, "zero": 3},
]


@pytest.mark.parametrize("degrees", PRODUCTS, ids=str)
def test_products_of_degrees_in_a_pipeline_equal_one_process(rank_pools, degrees):
    assert_equal_to_one_process(rank_pools, Case("1f1b", 2, 3, degrees=degrees, dropout=0.0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_schedule_written_as_a_program_equals_one_process(rank_pools, dtype):
    split = "F*{min(D-d,T)} (I F W)*{T-min(D-d,T)} I*{min(D-d,T)} W*{min(D-d,T)}"
    assert_equal_to_one_process(rank_pools, Case("flexpipe", 2, 4, dtype=dtype, parameters={"program": split}))
    looped = {"program": "F*{T} F:1*{T} B:1*{T} B*{T}"}
    assert_equal_to_one_process(rank_pools, Case("flexpipe", 2, 3, num_chunks=2, dtype=dtype, parameters=looped))


BRANCHES = ((0, 1), (1, 3), (2, 3))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_stage_that_joins_two_branches_takes_both(rank_pools, dtype):
    sizes = {"num_chunks": 1, "dropout": 0.1, "dtype": dtype}
    assert_equal_to_one_process(rank_pools, Case("graphpipe", 4, 6, edges=BRANCHES, **sizes))
    assert_equal_to_one_process(rank_pools, Case("distmm", 4, 6, edges=BRANCHES, **sizes))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_skip_connection_over_a_stage_goes_straight_to_where_it_is_read(rank_pools, dtype):
    case = Case("graphpipe", 3, 5, num_chunks=1, dropout=0.1, dtype=dtype, edges=SKIP)
    for result in assert_equal_to_one_process(rank_pools, case):
        # Rank 0 sends its output to both readers, rank 1 only its own output and gradient, rank 2 a gradient to each.
        message_bytes = case.microbatch * LENGTH * case.width * (8 if dtype == "float64" else 4)
        assert result.sent["send-receive/pp"] == 2 * case.num_microbatches * message_bytes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_halved_first_microbatches_equal_one_process(rank_pools, dtype):
    sizes = {"dtype": dtype, "dropout": 0.0}
    assert_equal_to_one_process(rank_pools, Case("autopipe", 4, 6, parameters={"halved": 2}, **sizes))
    assert_equal_to_one_process(
        rank_pools, Case("autopipe", 2, 3, parameters={"halved": 1}, degrees={"dp": 2, "zero": 1}, **sizes)
    )


def test_microbatches_made_for_each_batch_equal_one_process_with_weights_by_token(rank_pools):
    for ranks, told in ((2, {}), (4, {"cap_tokens": 24, "overhead_tokens": 2})):
        case = Case("dynapipe", ranks, 6, parameters=told, dropout=0.0, dtype="float64", reference_microbatch=12)
        assert_equal_to_one_process(rank_pools, case)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "vit"])
def test_hugging_face_models_run_unchanged(rank_pools, name):
    pytest.importorskip("transformers")
    dtype = "float32" if name == "mixtral" else "float64"  # its grouped products have no fp64
    assert_equal_to_one_process(
        rank_pools, Case("zb-h1", 2, 4, hugging_face=name, dropout=0.0, dtype=dtype, num_steps=2)
    )


def test_a_hugging_face_llama_runs_in_every_dimension(rank_pools):
    pytest.importorskip("transformers")
    sizes = {"hugging_face": "llama", "dropout": 0.0, "dtype": "float64", "num_steps": 2}
    assert_equal_to_one_process(rank_pools, Case("1f1b", 2, 4, degrees={"tp": 2, "sp": True}, **sizes))
    assert_equal_to_one_process(rank_pools, Case("1f1b", 2, 4, degrees={"cp": 2}, **sizes))
    assert_equal_to_one_process(rank_pools, Case("gpipe", 1, 4, degrees={"tp": 4}, clip_norm=0.05, **sizes))
    assert_equal_to_one_process(rank_pools, Case("gpipe", 1, 4, degrees={"tp": 4, "sp": True}, **sizes))
    assert_equal_to_one_process(rank_pools, Case("seq1f1b", 2, 4, num_slices=2, **sizes))


def test_a_schedule_without_its_reductions_is_refused(rank_pools):
    from rank_pool import RankError

    from stagewright.planner.schedules.costs import StageCosts
    from stagewright.planner.schedules.lowering import lower

    pool = rank_pools(2)
    prepared = prepare(Case("1f1b", 2, 4), pool.next_number())
    bare = lower(schedule_of(prepared.plan.schedule), StageCosts.uniform(2), data_parallel=False)
    with pytest.raises(RankError, match="0 REDUCE_GRAD actions, it needs 1"):
        pool.run("gradients_and_weights", replace(prepared, schedule=bare))


@pytest.mark.parametrize(
    "degrees",
    [{"dp": 2}, {"dp": 2, "zero": 2}, {"tp": 2, "sp": True, "vocab_parallel": True}, {"cp": 2, "zero": 1}],
    ids=str,
)
def test_clipping_by_the_norm_of_the_whole_model_equals_one_process(rank_pools, degrees):
    case = Case("1f1b", 2, 3, degrees=degrees, dropout=0.0, dtype="float64", clip_norm=0.05)
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.parametrize("num_choices", [1, 2])
def test_experts_divided_over_replicas_equal_one_process(rank_pools, num_choices):
    sizes = {"dropout": 0.0, "dtype": "float64", "num_choices": num_choices}
    assert_equal_to_one_process(rank_pools, Case("gpipe", 1, 2, degrees={"dp": 2, "ep": 2}, **sizes))
    assert_equal_to_one_process(rank_pools, Case("zb-h1", 2, 3, degrees={"dp": 4, "ep": 2}, **sizes))
    assert_equal_to_one_process(
        rank_pools, Case("1f1b", 2, 3, degrees={"dp": 4, "ep": 4}, recompute=("full",), **sizes)
    )


def test_the_experts_of_a_hugging_face_mixtral_are_divided_unchanged(rank_pools):
    pytest.importorskip("transformers")
    sizes = {"hugging_face": "mixtral", "dropout": 0.0}
    for experts in ({"ep": 2}, {"etp": 2}):
        assert_equal_to_one_process(rank_pools, Case("1f1b", 2, 2, degrees={"dp": 2, **experts}, **sizes))


def test_the_rest_of_a_model_with_a_frozen_prefix_equals_one_process(rank_pools):
    sizes = {"tied": False, "dtype": "float64", "num_blocks": 4}
    assert_equal_to_one_process(rank_pools, Case("1f1b", 2, 4, num_frozen=3, **sizes))  # a whole stage and more
    assert_equal_to_one_process(rank_pools, Case("zb-h1", 2, 4, num_frozen=2, degrees={"dp": 2, "zero": 1}, **sizes))
    assert_equal_to_one_process(rank_pools, Case("zb-v", 2, 4, num_frozen=3, recompute=("full",), **sizes))


def test_a_learning_rate_that_warms_up_equals_one_process(rank_pools):
    case = Case("1f1b", 2, 4, degrees={"dp": 2, "zero": 1}, dropout=0.0, dtype="float64", warm_up_steps=3)
    assert_equal_to_one_process(rank_pools, case)


@pytest.mark.parametrize(
    ("schedule", "degrees", "options"),
    [
        ("1f1b", {}, {"clip_norm": 0.5}),
        ("zb-h1", {"dp": 2}, {}),
        ("1f1b", {"dp": 2, "zero": 1}, {"clip_norm": 0.5}),
        ("1f1b", {"dp": 2, "zero": 2}, {}),
        ("1f1b", {"dp": 2, "zero": 3}, {"parameters": {"shard_size": 1}}),
        ("zb-v", {"dp": 2, "zero": 3}, {}),
        ("chimera", {"zero": 1}, {"tied": False}),
    ],
)
def test_weight_decay_leaves_alone_what_no_forward_uses(rank_pools, schedule, degrees, options):
    """torch passes over a parameter without a gradient; a buffer of gradients is zero there, and would let it decay."""
    case = Case(schedule, 2, 4, degrees=degrees, weight_decay=0.1, num_steps=3, **options)
    assert_equal_to_one_process(rank_pools, case)
