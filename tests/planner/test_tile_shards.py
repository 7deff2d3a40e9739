"""What each device steps where ZeRO cuts between bands of tiles, and what it holds for it."""

from __future__ import annotations

from math import prod

import pytest

from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import (
    Degrees,
    LayerClass,
    ModelProfile,
    Optimizer,
    Plan,
    Recompute,
    TrainingJob,
    WeightTensor,
)
from stagewright.planner.expectation import peak_bytes, peaks_by_device
from stagewright.planner.planned_schedule import stage_bounds
from stagewright.planner.prediction import evaluate
from stagewright.planner.tile_shards import owned_buckets, unlike_members
from stagewright.testing import cluster_factory, profile_factory

EMBEDDING = (WeightTensor(shape=(50, 8)),)
BLOCK = (
    WeightTensor(shape=(8,)),
    WeightTensor(shape=(24, 8), is_matrix=True),
    WeightTensor(shape=(8, 8), count=2, is_matrix=True),
    WeightTensor(shape=(4, 8, 10), is_matrix=True, of_experts=True),
)
DENSE = 8 + 192 + 2 * 64


def model(*, tied: bool) -> ModelProfile:
    """Return an embedding, two blocks and a head."""
    tensors = {"embedding": EMBEDDING, "block": BLOCK, "head": EMBEDDING}
    sizes = {kind: sum(each.count * each.num_elements for each in of) for kind, of in tensors.items()}
    kinds = ("embedding", "block", "block", "head")
    known = profile_factory(
        4,
        forward_s=1e-3,
        parameters=[sizes[kind] for kind in kinds],
        kinds=kinds,
        microbatches=(1,),
        tied=((0, 3),) if tied else (),
    )
    classes = {
        name: LayerClass(
            **{
                **{field: getattr(kind, field) for field in LayerClass.model_fields},
                "tensors": tensors[kind.kind],
                "expert_parameters": 320 if kind.kind == "block" else 0,
            }
        )
        for name, kind in known.classes.items()
    }
    return known.model_copy(update={"classes": classes})


def plan_of(profile: ModelProfile, *, ranks: int = 1, optimizer: str = "shampoo", **degrees: int) -> Plan:
    job = TrainingJob(
        global_batch=8, sequence_length=128, precision="fp32", optimizer=Optimizer.standard(optimizer, "fp32")
    )
    choice = Choice(Degrees(**degrees), ranks, 1, 1, "gpipe", Recompute.NONE)
    return even_plan(profile, cluster_factory(ranks * choice.degrees.num_devices, 1), job, choice)


def owned(plan: Plan, profile: ModelProfile, member: int) -> list[list[tuple[tuple[int, ...], int]]]:
    buckets = owned_buckets(plan, profile, 0, stage_bounds(plan.stages), member)
    return [[(each.shape, each.count) for each in bucket.tensors] for bucket in buckets]


def test_under_zero_3_every_layer_is_cut_by_itself_and_matrices_of_one_band_lie_on_one_device():
    profile = model(tied=False)
    plan = plan_of(profile, dp=2, zero=3)
    first, second = (owned(plan, profile, member) for member in (0, 1))
    halves = [((50, 8), 200)]
    # Half of a block's 648 elements ends in the second square one, nearer to its end; experts' matrices lie in a stack.
    assert first == [halves, *[[((8,), 8), ((24, 8), 192), ((8, 8), 64), ((8, 8), 64)]] * 2, halves]
    assert second == [halves, *[[((4, 8, 10), 320)]] * 2, halves]


def test_under_zero_1_a_stage_is_cut_as_a_whole_and_a_shared_weight_lies_where_it_comes_first():
    profile = model(tied=True)
    plan = plan_of(profile, dp=2, zero=1)
    first, second = (owned(plan, profile, member) for member in (0, 1))
    # Half of 1,696 elements is in the middle of the second matrix of the first block's stack.
    assert first == [[((50, 8), 400), ((8,), 8), ((24, 8), 192), ((8, 8), 64), ((8, 8), 64), ((4, 8, 10), 80)]]
    assert second == [[((4, 8, 10), 240), ((8,), 8), ((24, 8), 192), ((8, 8), 64), ((8, 8), 64), ((4, 8, 10), 320)]]


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("degrees", [{"dp": 4}, {"dp": 4, "ep": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_devices_step_every_element_once(zero, tied, degrees):
    profile = model(tied=tied)
    plan = plan_of(profile, zero=zero, **degrees)
    ep = degrees.get("ep", 1)
    bounds = stage_bounds(plan.stages)
    each = [owned_buckets(plan, profile, 0, bounds, member) for member in range(4)]
    stepped = sum(bucket.owned for buckets in each for bucket in buckets)
    assert stepped == 400 * (1 if tied else 2) + 2 * (DENSE + 320)
    experts = [bucket for bucket in each[0] if bucket.of_experts]
    assert [bucket.size for bucket in experts] == ([] if ep == 1 else [2 * 160] if zero == 1 else [160, 160])
    assert all(prod(piece.shape) >= piece.first + piece.count for bucket in each[1] for piece in bucket.tensors)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("zero", "ranks"), [(0, 1), (1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_a_run_is_expected_to_hold_moments_of_all_and_statistics_of_matrices_once_over_its_devices(tied, zero, ranks):
    """A weight that layers share has states once; it was taken to have statistics, or to have lost them twice."""
    profile = model(tied=tied)
    plan = plan_of(profile, ranks=ranks, dp=2, zero=zero)
    statistics = 2 * (24**2 + 8**2) + 2 * 2 * (8**2 + 8**2) + 4 * 2 * (8**2 + 10**2)
    parameters = 400 * (1 if tied and (ranks == 1 or zero) else 2) + 2 * (DENSE + 320)
    held = 0.0
    for member in range(2):
        evaluation = evaluate(plan, profile, member=member)
        held += (evaluation.pipeline.static_bytes[2] + evaluation.unlike_bytes[2]).sum()
    copies = 1 if zero else 2
    assert held == pytest.approx(copies * 4 * (2 * parameters + 2 * statistics))


def test_devices_that_step_unlike_parts_have_peaks_of_their_own_and_the_plan_tells_the_highest():
    profile = model(tied=False)
    plan = plan_of(profile, dp=2, zero=3)
    first, second = peaks_by_device(plan, profile)
    assert first != second
    assert peak_bytes(evaluate(plan, profile))[0] == pytest.approx(max(first, second), rel=0.01)
    assert unlike_members(plan) == ((0,), (1,))
    for alike in (plan_of(profile, dp=2), plan_of(profile, dp=2, zero=3, optimizer="adamw")):
        assert unlike_members(alike) == ()
        assert peaks_by_device(alike, profile) is None
