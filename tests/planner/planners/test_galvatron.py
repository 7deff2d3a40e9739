"""Galvatron's layer-wise programme against every choice of strategies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stagewright.planner.documents import Degrees, Plan, StagePlan, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.layerwise import changes_of, layerwise_schedule
from stagewright.planner.planners.galvatron import layer_strategies
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import with_prediction
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


@pytest.mark.parametrize("seed", range(20))
def test_the_programme_equals_every_choice_with_transitions(seed):
    draw = np.random.default_rng(seed)
    layers, strategies = int(draw.integers(2, 6)), 3
    seconds, units = draw.uniform(0.1, 1, (layers, strategies)), draw.integers(1, 9, (layers, strategies))
    change = draw.uniform(0, 0.5, (strategies, strategies))
    np.fill_diagonal(change, 0.0)
    budget = int(draw.integers(2 * layers, 7 * layers))
    best = np.inf
    for choice in itertools.product(range(strategies), repeat=layers):
        if sum(units[layer, c] for layer, c in enumerate(choice)) <= budget:
            moved = sum(change[a, b] for a, b in itertools.pairwise(choice))
            best = min(best, sum(seconds[layer, c] for layer, c in enumerate(choice)) + moved)
    found = layer_strategies(seconds, units, change, budget)
    if np.isinf(best):
        assert found is None
        return
    assert found is not None
    assert found[0] == pytest.approx(best, rel=1e-12)
    assert sum(units[layer, c] for layer, c in enumerate(found[1])) <= budget


# Layers of few parameters and large activations, then the other way round: replicas for the first, tensor splits behind.
PROFILE = profile_factory(
    5,
    forward_s=4e-3,
    parameters=[1_000_000] * 3 + [120_000_000] * 2,
    activation_bytes=4e6,
    output_bytes=[8e6] * 3 + [1e5] * 2,
    tensor_degrees=(1, 2),
)


def _planned(*, by_stage: bool, sp: str = "off", zero: tuple[int, ...] = (0,)) -> Plan:
    pins = Pins(pp=1, sp=None if sp == "any" else sp)
    space = SearchSpace(schedules=("1f1b",), pins=pins, zero=zero, per_stage_degrees=by_stage)
    job = TrainingJob(global_batch=16, sequence_length=128, precision="fp32", space=space)
    found = make_plan(PROFILE, cluster_factory(2, 1, bytes_per_s=5e9), job, planner="galvatron")
    assert found.plan is not None
    return found.plan


def _with_degrees(plan: Plan, choice: tuple[int, ...], samples: int) -> Plan:
    """The plan whose layers have these tensor degrees on its two devices."""
    stages, first = [], 0
    for tp, run in itertools.groupby(choice):
        count = len(list(run))
        stages.append(StagePlan(layers=(first, first + count), degrees=Degrees(tp=tp, dp=2 // tp)))
        first += count
    spec = layerwise_schedule(len(stages), 16 // samples, samples // stages[0].degrees.dp)
    return with_prediction(plan.model_copy(update={"stages": tuple(stages), "schedule": spec}), PROFILE)


def test_layers_that_differ_take_degrees_of_their_own_and_beat_every_uniform_plan():
    uniform, plan = _planned(by_stage=False), _planned(by_stage=True)
    assert [stage.layers for stage in plan.stages] == [(0, 3), (3, 5)]
    assert [(stage.degrees.dp, stage.degrees.tp) for stage in plan.stages] == [(2, 1), (1, 2)]
    assert plan.prediction.step_time_s < 0.8 * uniform.prediction.step_time_s
    # the third layer's output, 8 MB a sample: each device gathers the half of 16 samples that the other one has
    assert plan.prediction.link_bytes["all-gather/reshard"] == 16 * 8e6


def test_sequences_are_divided_where_tensors_are_and_joined_again_in_front_of_replicas():
    plan = _planned(by_stage=True, sp="any")
    assert [(stage.degrees.dp, stage.degrees.tp, stage.degrees.sp) for stage in plan.stages] == [
        (2, 1, False),
        (1, 2, True),
    ]
    # beside the samples of the forward, the backward gathers the gradient of the half of each sequence that is elsewhere
    assert plan.prediction.link_bytes["all-gather/reshard"] == 2 * 16 * 8e6


def test_replicas_divide_states_where_the_optimizers_step_is_shorter_than_what_gathers_leave_open():
    plain, sharded = _planned(by_stage=True), _planned(by_stage=True, zero=(0, 3))
    assert [(stage.degrees.dp, stage.degrees.zero) for stage in sharded.stages] == [(2, 3), (1, 0)]
    assert sharded.prediction.step_time_s < plain.prediction.step_time_s


def test_the_plan_by_layer_is_the_least_simulated_step_of_every_choice_of_degrees():
    plan = _planned(by_stage=True)
    steps = {
        (choice, samples): _with_degrees(plan, choice, samples).prediction.step_time_s
        for choice in itertools.product((1, 2), repeat=5)
        for samples in ((2, 4, 8) if 1 in choice else (1, 2, 4, 8))
    }
    assert plan.prediction.step_time_s <= min(steps.values()) * (1 + 1e-4)  # the programme leaves a latency a stage out


def test_replicas_that_do_not_nest_are_refused():
    plan = _planned(by_stage=True)
    first, second = plan.stages
    odd = plan.model_copy(update={"stages": (first, second.model_copy(update={"degrees": Degrees(dp=3)}))})
    with pytest.raises(InvalidDocument, match="replicas of one must divide those of the other"):
        changes_of(odd, ["block"] * 5)
