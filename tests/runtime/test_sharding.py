"""Sharded states: weights of ZeRO are those of replicas, bytes those of the ledger, and two layers at most are whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
from runtime_cases import LENGTH, Case, make_model, prepare
from runtime_documents import profile_of
from test_schedules import assert_equal_to_one_process

from stagewright.modeling import split
from stagewright.planner.cost.data_parallel import fsdp_peak_parameter_bytes
from stagewright.planner.cost.memory import device_state_bytes
from stagewright.planner.prediction import evaluate

pytestmark = pytest.mark.ranks

NUM_PARAMETERS = 7312 + 36 * 16  # with a head of its own
WHOLE = 4.0 * NUM_PARAMETERS  # bytes in fp32


def trained(pools, zero: int, **parameters):
    """Five AdamW steps of four replicas, without ZeRO and with it."""
    pool = pools(4)
    plain, sharded = (
        prepare(
            Case(
                "gpipe",
                1,
                2,
                degrees={"dp": 4, "zero": level},
                dropout=0.0,
                dtype="float64",
                tied=False,
                parameters=given,
            ),
            pool.next_number(),
        )
        for level, given in ((0, {}), (zero, parameters))
    )
    return sharded.plan, pool.run("degree_cases.train_and_compare", (plain, sharded, 5))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_five_steps_of_zero_on_four_processes_equal_replicas_and_hold_the_ledgers_bytes(rank_pools, zero):
    plan, results = trained(rank_pools, zero)
    ledger = device_state_bytes(NUM_PARAMETERS, 0.0, plan.stages[0].degrees, plan.job.optimizer)
    for result in results:
        assert result.max_relative_error <= 1e-10
        assert result.memory.states == pytest.approx(ledger.total, rel=0.01)
        assert result.memory.parameters == pytest.approx(ledger.parameters, rel=0.01)
        assert result.memory.gradients == pytest.approx(ledger.gradients, rel=0.01)
        assert result.memory.optimizer == pytest.approx(ledger.optimizer, rel=0.01)


def test_fully_sharded_layers_are_whole_two_at_a_time_beside_the_shards(rank_pools):
    _, results = trained(rank_pools, 3)
    for result in results:
        limit = fsdp_peak_parameter_bytes(result.unit_bytes, 4)
        assert sum(result.unit_bytes) / 4 + max(result.unit_bytes) < result.peak_parameter_bytes <= limit


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_states_sharded_inside_groups_equal_replicas_and_are_summed_across_once(rank_pools, zero):
    plan, results = trained(rank_pools, zero, shard_size=2)
    ledger = device_state_bytes(NUM_PARAMETERS, 0.0, plan.stages[0].degrees, plan.job.optimizer, shard_size=2)
    for result in results:
        assert result.max_relative_error <= 1e-10
        assert result.memory.states == pytest.approx(ledger.total, rel=0.01)


def test_hybrid_shards_send_half_of_the_model_between_groups_once_an_iteration(rank_pools):
    pool = rank_pools(4)
    case = Case("gpipe", 1, 3, degrees={"dp": 4, "zero": 3}, dropout=0.0, tied=False, parameters={"shard_size": 2})
    for sent in pool.run("degree_cases.sent_in_a_step", prepare(case, pool.next_number())):
        assert sent["reduce-scatter/dp"] == 3 * WHOLE / 2  # each microbatch, inside the groups of two
        assert sent["all-gather/dp"] == 2 * 3 * WHOLE / 2
        assert sent["all-reduce/dp"] == 2 * (1 / 2) * WHOLE / 2  # once, the shards between the groups


@pytest.mark.parametrize("gather", ["run", "layer"])
def test_breadth_first_gathers_each_chunk_twice_and_not_twice_a_microbatch(rank_pools, gather):
    pool = rank_pools(4)
    parameters = {"gather": gather}
    case = Case(
        "breadth-first",
        2,
        4,
        num_chunks=2,
        degrees={"dp": 2, "zero": 3},
        dropout=0.0,
        tied=False,
        parameters=parameters,
    )
    results = pool.run("degree_cases.sent_in_a_step", prepare(case, pool.next_number()))
    whole = (sum(sent["reduce-scatter/dp"] for sent in results)) / 4  # four microbatches
    assert sum(sent["all-gather/dp"] for sent in results) == whole * 2 * (1 if gather == "run" else 4)
    assert_equal_to_one_process(rank_pools, case)


BY_STAGE = [
    Case("1f1b", 2, 4, degrees={"dp": 2}, by_stage=({"zero": 3}, {"zero": 0})),
    Case(
        "interleaved",
        2,
        4,
        degrees={"dp": 2},
        by_stage=tuple({"zero": zero} for zero in (2, 0, 3, 1)),
        dtype="float64",
        clip_norm=0.05,
        tied=False,
    ),
]


@pytest.mark.parametrize("case", BY_STAGE, ids=lambda case: case.schedule)
def test_stages_with_a_zero_stage_of_their_own_equal_one_process(rank_pools, case):
    assert_equal_to_one_process(rank_pools, case)


def test_each_stage_holds_the_bytes_of_its_own_zero_stage(rank_pools):
    """Mist's choice: the second stage shards what the first one replicates, and each rank holds just its ledger."""
    pool = rank_pools(4)
    case = Case("1f1b", 2, 4, degrees={"dp": 2}, by_stage=({"zero": 0}, {"zero": 2}), dropout=0.0, tied=False)
    prepared = prepare(case, pool.next_number())
    results = pool.run("degree_cases.held_states", prepared)
    counts = [layer.num_parameters for layer in split(make_model(case, 4)).layers]
    ranks = prepared.plan.mapping.pipeline_ranks
    for stage, devices in zip(prepared.plan.stages, ranks, strict=True):
        held = sum(counts[index] for index in stage.layer_indices)
        ledger = device_state_bytes(held, 0.0, stage.degrees, prepared.plan.job.optimizer)
        for rank in devices:
            assert results[rank].states == pytest.approx(ledger.total, rel=0.01)


@pytest.mark.parametrize("degrees", [{"dp": 2}, *({"dp": 2, "zero": zero} for zero in (1, 2, 3))], ids=str)
def test_a_weight_that_two_stages_share_is_held_as_is_expected(rank_pools, degrees):
    """Its states lie over the devices of both stages, its gradients and itself whole on each of them."""
    _assert_held_as_expected(rank_pools, Case("1f1b", 2, 4, degrees=degrees, dropout=0.0, tied=True, width=32))


@pytest.mark.parametrize("zero", range(4))
def test_in_bf16_gradients_stay_in_their_own_type_beside_masters_as_is_expected(rank_pools, zero):
    """They once lay in fp32 beside the masters, 2 bytes a parameter more. ZeRO-3 gathers from the masters alone."""
    degrees = {"dp": 2, "zero": zero}
    for tied in (False, True):
        case = Case("1f1b", 2, 4, degrees=degrees, dropout=0.0, tied=tied, width=32, dtype="bfloat16")
        _assert_held_as_expected(rank_pools, case)


@pytest.mark.parametrize("degrees", [{}, {"zero": 1}], ids=str)
def test_weights_in_bf16_are_compared_with_one_process_that_has_masters_too(rank_pools, degrees):
    """Without masters a norm's weights of 1 do not move by less than 2 ** -9, and all of their change was missing."""
    assert_equal_to_one_process(
        rank_pools, Case("1f1b", 2, 4, degrees=degrees, dropout=0.0, tied=False, dtype="bfloat16")
    )


def _assert_held_as_expected(pools, case: Case) -> None:
    pool = pools(4)
    prepared = prepare(case, pool.next_number())
    profile = profile_of(split(make_model(case, 4)), sequence_length=LENGTH)
    evaluation = evaluate(prepared.plan, profile)
    for rank, memory in enumerate(pool.run("degree_cases.held_states", prepared)):
        items = evaluation.prediction.memory[rank // 2]
        parameters, gradients, optimizer = evaluation.unlike_bytes[:, rank // 2]
        masters = (items.optimizer + optimizer) / 3 if case.dtype == "bfloat16" else 0.0  # beside two moments
        assert memory.parameters == pytest.approx(items.parameters + parameters + masters, rel=0.01)
        assert memory.gradients == pytest.approx(items.gradients + gradients, rel=0.01)
        assert memory.optimizer == pytest.approx(items.optimizer + optimizer - masters, rel=0.01)


def test_a_stage_on_one_device_sums_gradients_where_they_stay_whatever_zero_is_asked_of_it(rank_pools):
    """In bf16 a second set of a stage's gradients came and went with each microbatch, which no prediction held."""
    pool = rank_pools(2)
    case = Case("1f1b", 2, 2, dropout=0.0, tied=False, dtype="bfloat16")
    peaks = [
        pool.run("peak_memory", prepare(replace(case, degrees={"zero": zero}), pool.next_number()))
        for zero in (1, 2, 3)
    ]
    assert peaks[0] == peaks[1] == peaks[2]
