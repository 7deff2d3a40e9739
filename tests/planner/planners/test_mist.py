"""Mist's programme against every partition and option, and plans whose stages keep their states in different places."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from stagewright.planner.documents import Optimizer, Plan, TrainingJob
from stagewright.planner.documents.job import OptimizerName, Pins, SearchSpace
from stagewright.planner.errors import InvalidArgument, InvalidDocument
from stagewright.planner.planners.mist import inter_stage, pareto_points
from stagewright.planner.planners.stage_table import ranges_of
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import with_prediction
from stagewright.planner.search.brute_force import all_partitions
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


@pytest.mark.parametrize("seed", range(8))
def test_the_integer_programme_equals_every_partition_with_every_option(seed):
    draw = np.random.default_rng(seed)
    layers, stages, count = int(draw.integers(4, 7)), int(draw.integers(2, 4)), int(draw.integers(1, 9))
    options = 1 + seed % 3
    steady = np.stack([[ranges_of(draw.uniform(0.5, 1.5, layers)) for _ in range(stages)] for _ in range(options)])
    steady[draw.random(steady.shape) < 0.1] = np.inf
    once = np.stack([ranges_of(draw.uniform(0, 2, layers)) for _ in range(options)])
    best = np.inf
    for bounds, chosen in product(all_partitions(layers, stages), product(range(options), repeat=stages)):
        times = [steady[chosen[s], s, bounds[s], bounds[s + 1]] for s in range(stages)]
        if np.isfinite(times).all():
            waits = [once[chosen[s], bounds[s], bounds[s + 1]] - sum(times[:s]) for s in range(stages)]
            best = min(best, (count - 1) * max(times) + sum(times) + max(0.0, *waits))
    found = inter_stage(steady, once, count)
    assert (found is None) == np.isinf(best)
    if found is not None:
        assert found.value == pytest.approx(best, rel=1e-5)


def test_a_point_that_another_option_equals_or_beats_in_both_numbers_is_not_offered():
    steady = np.array([1.0, 2.0, 1.0, 3.0]).reshape(4, 1, 1, 1)
    once = np.array([5.0, 4.0, 5.0, 4.5]).reshape(4, 1, 1)
    assert pareto_points(steady, once).ravel().tolist() == [True, True, False, False]


PROFILE = profile_factory(
    8, forward_s=2e-3, parameters=25_000_000, activation_bytes=40e6, output_bytes=1e6, microbatches=(1, 2, 4, 8)
)


FOUR_STAGES = Pins(pp=4, dp=1, microbatch=1)


def _planned(
    memory_bytes: float,
    *,
    by_stage: bool,
    host_bytes_per_s: float | None = 25e9,
    pins: Pins = FOUR_STAGES,
    optimizer: OptimizerName = "adamw",
) -> Plan:
    cluster = cluster_factory(4, 1, memory_bytes=memory_bytes, bytes_per_s=5e9)
    (group,) = cluster.groups
    device = group.device.model_copy(update={"host_bytes_per_s": host_bytes_per_s})
    cluster = cluster.model_copy(update={"groups": (group.model_copy(update={"device": device}),)})
    job = TrainingJob(
        global_batch=64,
        sequence_length=128,
        precision="fp32",
        optimizer=Optimizer.standard(optimizer, "fp32"),
        space=SearchSpace(schedules=("1f1b",), pins=pins, per_stage_degrees=by_stage),
    )
    found = make_plan(PROFILE, cluster, job, planner="mist")
    assert found.plan is not None
    return found.plan


def test_stages_that_hold_more_microbatches_offload_their_optimizer_where_the_others_keep_it():
    """Four stages of 1F1B hold 4, 3, 2 and 1 microbatches: with room for two of them the first stages give up states."""
    memory = 1.0e9
    uniform, plan = _planned(memory, by_stage=False), _planned(memory, by_stage=True)
    shares = [stage.optimizer_offload for stage in plan.stages]
    assert shares[0] > shares[-1] == 0.0
    assert plan.prediction.step_time_s < 0.9 * uniform.prediction.step_time_s
    recomputed = [sum(level.value != "none" for level in stage.recompute_levels()) for stage in uniform.stages]
    assert recomputed[0] > 0  # what the uniform plan pays instead
    assert max(plan.prediction.peak_memory_bytes) <= memory * 0.95


def test_stages_take_zero_stages_of_their_own_where_one_for_all_costs_more():
    """The first of two stages shards its gradients too, the second only its optimizer's states."""
    pins = Pins(pp=2, dp=2, microbatch=2)
    uniform, plan = (_planned(1.6e9, by_stage=each, host_bytes_per_s=None, pins=pins) for each in (False, True))
    assert [stage.degrees.zero for stage in uniform.stages] == [2, 2]
    assert [stage.degrees.zero for stage in plan.stages] == [2, 1]
    assert plan.prediction.step_time_s < 0.99 * uniform.prediction.step_time_s


def test_plans_by_stage_are_never_behind_uniform_ones():
    for memory in (1.0e9, 1.3e9, 2e9, 8e9):
        uniform, plan = _planned(memory, by_stage=False), _planned(memory, by_stage=True)
        assert plan.prediction.step_time_s <= uniform.prediction.step_time_s


def test_offloaded_states_leave_the_ledger_and_are_streamed_in_once_a_step():
    plan = _planned(8e9, by_stage=True)
    assert [stage.optimizer_offload for stage in plan.stages] == [0.0] * 4
    stages = tuple(stage.model_copy(update={"optimizer_offload": 0.5}) for stage in plan.stages)
    half = with_prediction(plan.model_copy(update={"stages": stages}), PROFILE)
    before, after = plan.prediction.memory[0].optimizer, half.prediction.memory[0].optimizer
    assert after == pytest.approx(0.5 * before)
    assert half.prediction.step_time_s - plan.prediction.step_time_s == pytest.approx(0.5 * before / 25e9, rel=0.2)
    with pytest.raises(InvalidDocument, match="states no bandwidth to a host"):
        _without_host(half)


def _without_host(plan: Plan) -> Plan:
    (group,) = plan.cluster.groups
    device = group.device.model_copy(update={"host_bytes_per_s": None})
    cluster = plan.cluster.model_copy(update={"groups": (group.model_copy(update={"device": device}),)})
    return with_prediction(plan.model_copy(update={"cluster": cluster}), PROFILE)


def test_states_of_an_optimizer_that_needs_whole_matrices_stay_on_the_device():
    plan = _planned(0.8e9, by_stage=True, optimizer="sgd-momentum")
    assert plan.stages[0].optimizer_offload > 0
    plan = _planned(0.8e9, by_stage=True, optimizer="muon")  # as large states
    assert all(stage.optimizer_offload == 0 for stage in plan.stages)


def test_a_planner_of_equal_stages_refuses_degrees_by_stage():
    job = TrainingJob(global_batch=8, sequence_length=128, space=SearchSpace(per_stage_degrees=True))
    with pytest.raises(InvalidArgument, match="per_stage_degrees"):
        make_plan(PROFILE, cluster_factory(2, 1), job, planner="alpa")
