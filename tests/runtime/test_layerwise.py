"""Layers of one pipeline rank with degrees of their own, resharded between them (Galvatron)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, PreparedCase, make_model, prepare, prepare_plan
from runtime_documents import profile_of
from runtime_models import LENGTH, hugging_face

from stagewright.modeling import split
from stagewright.planner.documents import (
    Cluster,
    Degrees,
    ModelProfile,
    RankMapping,
    RecomputeRun,
    StagePlan,
    TrainingJob,
)
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.layerwise import layerwise_schedule
from stagewright.planner.models.hugging_face import profile_from_config
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import evaluate
from stagewright.profiler.model_profile import profile_model
from stagewright.runtime.run import run_plan
from stagewright.runtime.support import (
    check_layerwise_model,
    check_shared_weights,
    check_split_logits,
    check_supported,
)
from stagewright.testing.mocked_cluster import cluster_factory

pytestmark = pytest.mark.ranks

MICROBATCHES, SAMPLES = 2, 8
CASE = Case(
    "gpipe",
    1,
    MICROBATCHES,
    dropout=0.0,
    dtype="float64",
    num_blocks=4,
    tied=False,
    clip_norm=0.05,
    reference_microbatch=SAMPLES,
)
BOUNDARY_BYTES = LENGTH * 16 * 8.0  # of one sample: 16 numbers of fp64 a token
Own = dict[str, object]


def _prepared(pool, stages: tuple[Own, ...], case: Case = CASE, samples: int = SAMPLES) -> PreparedCase:
    """Eight layers of a model, cut evenly into stages of these degrees and fields."""
    devices = Degrees(**{name: stages[0].get(name, 1) for name in ("dp", "tp")}).num_devices
    prepared = prepare(replace(case, degrees={"dp": devices}), pool.next_number())
    count, layers = len(stages), prepared.plan.num_layers
    bounds = [index * layers // count for index in range(count + 1)]
    made = []
    for pair, own in zip(pairwise(bounds), stages, strict=True):
        degrees = Degrees(**{name: value for name, value in own.items() if name in Degrees.model_fields})
        rest = {name: value for name, value in own.items() if name not in Degrees.model_fields}
        made.append(StagePlan(layers=pair, degrees=degrees, **rest))
    update = {
        "stages": tuple(made),
        "job": prepared.plan.job.model_copy(update={"global_batch": MICROBATCHES * samples}),
        "mapping": RankMapping(pipeline_ranks=(tuple(range(devices)),)),
        "schedule": layerwise_schedule(count, MICROBATCHES, samples // made[0].degrees.dp).model_copy(
            update={"parameters": case.parameters}
        ),
    }
    return prepare_plan(case, prepared.plan.model_copy(update=update), prepared.number)


def _profile(case: Case = CASE):
    return profile_of(
        split(make_model(case, 2)),
        sequence_length=LENGTH,
        microbatches=(1, 2, 4, 8),
        output_bytes=BOUNDARY_BYTES,
        tensor_degrees=(1, 2, 4),
    )


def _assert_equal_to_one_process(pool, prepared: PreparedCase, tolerance: float = 1e-10) -> list:
    check_supported(prepared.plan)
    results = pool.run("gradients_and_weights", prepared)
    for result in results:
        assert result.gradients.max_relative_error <= tolerance
        assert result.weights.max_relative_error <= tolerance
    assert sum(result.loss or 0.0 for result in results) == pytest.approx(results[0].reference_loss, rel=tolerance)
    return results


def _id(stages: tuple[Own, ...]) -> str:
    return "-".join(".".join(f"{name}{int(value)}" for name, value in own.items()) for own in stages)


CASES = [
    ({"tp": 2}, {"dp": 2}),
    ({"dp": 2}, {"tp": 2}),
    ({"dp": 2, "zero": 1}, {"tp": 2}, {"dp": 2, "zero": 3}, {"dp": 2, "zero": 2}),
    ({"tp": 2, "sp": True}, {"dp": 2, "zero": 3}),
    ({"dp": 2, "zero": 2}, {"tp": 2, "sp": True}),
    ({"tp": 2}, {"tp": 2, "sp": True}, {"tp": 2}, {"tp": 2, "vocab_parallel": True}),
    ({"tp": 2, "vocab_parallel": True}, {"dp": 2}, {"tp": 2, "sp": True, "vocab_parallel": True}),
]
WIDE = [
    ({"tp": 4}, {"dp": 4}),
    ({"tp": 2, "dp": 2}, {"dp": 4}, {"tp": 4}, {"tp": 2, "dp": 2}),
    ({"tp": 2, "dp": 2, "sp": True, "zero": 1}, {"tp": 4, "sp": True}, {"dp": 4, "zero": 3}),
    ({"dp": 4, "zero": 3}, {"tp": 4, "sp": True}, {"tp": 2, "dp": 2, "sp": True, "vocab_parallel": True, "zero": 2}),
]


@pytest.mark.parametrize("stages", CASES, ids=_id)
def test_layers_with_degrees_of_their_own_train_as_one_process(rank_pools, stages):
    pool = rank_pools(2)
    _assert_equal_to_one_process(pool, _prepared(pool, stages))


@pytest.mark.parametrize("stages", WIDE, ids=_id)
def test_layers_with_degrees_of_their_own_train_as_one_process_on_four_ranks(rank_pools, stages):
    pool = rank_pools(4)
    _assert_equal_to_one_process(pool, _prepared(pool, stages))


def _choices(world: int) -> list[Own]:
    """Tensor and data degrees on so many devices, with and without what they may have beside them."""
    found: list[Own] = []
    for tp in (tp for tp in (1, 2, 4) if world % tp == 0):
        degrees = {"tp": tp, "dp": world // tp}
        found += [{**degrees, "zero": zero} for zero in (range(4) if tp < world else (0,))]
        found += [{**degrees, "sp": True, "zero": zero} for zero in ((1, 3) if tp < world else (0,)) if tp > 1]
    return found


@pytest.mark.soak
@pytest.mark.parametrize("stages", [*permutations(_choices(2), 2), *permutations(_choices(4), 2)], ids=_id)
def test_every_pair_of_degrees_trains_as_one_process(rank_pools, stages):
    pool = rank_pools(stages[0]["tp"] * stages[0]["dp"])
    _assert_equal_to_one_process(pool, _prepared(pool, stages))


def test_layers_in_mixed_precision_differ_from_one_process_by_the_rounding_of_bf16(rank_pools):
    pool = rank_pools(2)
    stages = ({"tp": 2, "sp": True}, {"dp": 2, "zero": 1}, {"dp": 2, "zero": 3})
    for case in (replace(CASE, dtype="bfloat16"), replace(CASE, dtype="float32", parameters={"autocast": "bf16"})):
        prepared = _prepared(pool, stages, case)
        check_supported(prepared.plan)
        for result in pool.run("gradients_and_weights", prepared):
            assert 1e-5 < result.gradients.max_relative_error < 5e-2


def test_weights_that_stages_share_are_summed_over_both_where_these_split_them_alike(rank_pools):
    pool = rank_pools(2)
    case = replace(CASE, tied=True)
    stages = ({"dp": 2, "zero": 1}, {"tp": 2, "sp": True}, {"dp": 2})
    prepared = _prepared(pool, stages, case)
    check_shared_weights(prepared.plan, _profile(case))
    _assert_equal_to_one_process(pool, prepared)
    apart = _prepared(pool, ({"tp": 2}, {"dp": 2}), case)
    with pytest.raises(InvalidArgument, match=r"share a weight, with \(tp, vocab_parallel, sp\)"):
        check_shared_weights(apart.plan, _profile(case))


def test_optimizer_states_lie_on_the_host_by_stage(rank_pools):
    pool = rank_pools(2)
    stages = ({"tp": 2, "optimizer_offload": 0.5}, {"dp": 2, "zero": 1, "optimizer_offload": 1.0})
    _assert_equal_to_one_process(pool, _prepared(pool, stages))


@pytest.mark.parametrize("optimizer", ["muon", "shampoo"])
def test_whole_matrices_of_every_stage_are_stepped(rank_pools, optimizer):
    pool = rank_pools(2)
    case = replace(CASE, optimizer=optimizer, clip_norm=None)
    _assert_equal_to_one_process(pool, _prepared(pool, ({"tp": 2}, {"dp": 2, "zero": 1}), case))


def test_layers_are_recomputed_by_stage(rank_pools):
    pool = rank_pools(2)
    full = {"recompute": (RecomputeRun(level="full", count=4),)}
    _assert_equal_to_one_process(pool, _prepared(pool, ({"dp": 2, "zero": 3, **full}, {"tp": 2, "sp": True, **full})))


def test_a_plan_of_equal_degrees_goes_on_from_a_checkpoint_of_one_by_layer(rank_pools, tmp_path):
    pool = rank_pools(2)
    case = replace(CASE, clip_norm=None, microbatch=SAMPLES)
    first = _prepared(pool, ({"dp": 2, "zero": 3}, {"tp": 2, "sp": True}), case)
    second = _prepared(pool, ({"dp": 2},), case)
    errors = pool.run("continue_under_another_plan", (first, second, str(tmp_path)))
    assert max(errors) <= 1e-10


def test_what_layers_with_degrees_of_their_own_do_not_take_is_refused_by_name(rank_pools):
    pool = rank_pools(2)
    plan = _prepared(pool, ({"tp": 2}, {"dp": 2})).plan
    first, second = plan.stages
    check_supported(plan)
    check_layerwise_model(plan, _profile())
    shares = second.model_copy(update={"batch_shares": (5, 3)})
    with pytest.raises(InvalidArgument, match=r"stages\[1\] has .*batch_shares \[5, 3\]"):
        check_supported(plan.model_copy(update={"stages": (first, shares)}))
    spec = plan.schedule.model_copy(update={"num_slices": 2})
    with pytest.raises(InvalidArgument, match="2 slices, 1 model replicas"):
        check_supported(plan.model_copy(update={"schedule": spec}))
    last = plan.num_layers - 1
    cut = tuple(
        StagePlan(layers=layers, degrees=Degrees(**own))
        for layers, own in (((0, last), {"tp": 2, "vocab_parallel": True}), ((last, last + 1), {"dp": 2}))
    )
    with pytest.raises(InvalidArgument, match="a head with vocab_parallel keeps its degrees up to the loss"):
        check_split_logits(plan.model_copy(update={"stages": cut}), _profile())


LLAMA = [
    ({"tp": 2}, {"dp": 2, "zero": 1}),
    ({"dp": 2, "zero": 3}, {"tp": 2, "sp": True, "vocab_parallel": True}),
    ({"tp": 2, "sp": True}, {"tp": 2}, {"dp": 2, "zero": 2}),
    ({"dp": 2}, {"tp": 2, "sp": True}, {"dp": 2, "zero": 3}),
    ({"tp": 2, "dp": 2, "sp": True, "zero": 2}, {"tp": 4, "sp": True}, {"dp": 4, "zero": 3}),
]


@pytest.mark.parametrize("stages", LLAMA, ids=_id)
def test_a_llama_sends_what_is_predicted_to_the_byte(rank_pools, stages):
    pytest.importorskip("transformers")
    case = Case("gpipe", 1, MICROBATCHES, dropout=0.0, hugging_face="llama", microbatch=2)
    pool = rank_pools(4 if "dp4" in _id(stages) else 2)
    prepared = _prepared(pool, stages, case, samples=4)
    profile = profile_from_config(hugging_face("llama")[0].config.to_dict(), "llama")
    predicted = evaluate(prepared.plan.model_copy(update={"layer_digest": profile.layer_digest}), profile).prediction
    results = pool.run("degree_cases.sent_in_a_step", prepared)
    measured = {name: sum(sent.get(name, 0.0) for sent in results) for sent in results for name in sent}
    assert {name: value for name, value in measured.items() if value} == pytest.approx(predicted.link_bytes, rel=1e-9)
    assert measured["all-gather/reshard"] > 0


MODELS = Path(__file__).parent / "runtime_models.py"


def _with_seconds(profile: ModelProfile) -> ModelProfile:
    """The profile with seconds that no machine decides: a millisecond a sample, which only blocks divide by their tensor degree."""
    classes = {}
    for name, each in profile.classes.items():
        costs = []
        for cost in each.costs:
            seconds = 1e-3 * cost.microbatch / (cost.tensor_degree if each.kind == "block" else 1)
            same = dict.fromkeys(("forward_s", "input_grad_s", "weight_grad_s"), seconds)
            costs.append(cost.model_copy(update={**same, "split_excess_s": 0.0, "optimizer_s": 0.0}))
        classes[name] = each.model_copy(update={"costs": tuple(costs)})
    return profile.model_copy(update={"classes": classes})


def test_what_galvatron_returns_runs_with_every_check():
    """Blocks divide tensors and sequences, since their weights would be gathered for each microbatch; the rest divides samples."""
    model, data = f"{MODELS}:build_wide", f"{MODELS}:data"
    profile = _with_seconds(
        profile_model(
            model,
            data=data,
            microbatches=(2, 4),
            sequence_length=LENGTH,
            tensor_degrees=(1, 2),
            device="cpu",
            dtype="fp64",
            budget_s=1.0,
        )
    )
    space = SearchSpace(schedules=("1f1b",), zero=(3,), pins=Pins(pp=1), per_stage_degrees=True)
    job = TrainingJob(global_batch=8, sequence_length=LENGTH, precision="fp64", space=space)
    plan = make_plan(profile, _on_processors(cluster_factory(2, bytes_per_s=1e8)), job, planner="galvatron").plan
    assert plan is not None
    sharded, split_up = Degrees(dp=2, zero=3), Degrees(tp=2, sp=True, vocab_parallel=True)
    assert [stage.degrees for stage in plan.stages] == [sharded, split_up, sharded]
    report = run_plan(plan, profile, model=model, data=data, steps=1, checks=("gradients", "memory", "traffic"))
    assert all(report.checks[name]["passed"] for name in ("gradients", "memory", "traffic")), report.checks


def _on_processors(cluster: Cluster) -> Cluster:
    (group,) = cluster.groups
    device = group.device.model_copy(update={"kind": "cpu"})
    return cluster.model_copy(update={"groups": (group.model_copy(update={"device": device}),)})
