"""Alpa's inter-operator pass: its oracles, and T* as GPipe's simulated step."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost.communication import collective_s
from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planners.alpa import inter_operator
from stagewright.planner.planners.alpa_intra import IntraOperator, block_layers, block_problem
from stagewright.planner.planners.reach import Reach, configurations, rule_of
from stagewright.planner.planners.stage_table import StageTable, ranges_of
from stagewright.planner.planning import make_plan
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.search.problem import Candidate, Problem
from stagewright.planner.sharding.intra_operator import shard_layer
from stagewright.planner.sharding.layout import split
from stagewright.planner.simulation.simulate import StageCosts, simulate

UNIT = ranges_of(np.ones(8))


def test_eight_unit_layers_on_four_devices_one_at_a_time_take_22():
    found = inter_operator(UNIT[None], [1], 4, 8)
    assert found is not None
    assert found.value == 8 + 7 * 2 == 22
    assert found.bounds == (0, 2, 4, 6, 8)


def test_with_perfect_scaling_inside_a_stage_one_stage_on_four_devices_takes_16():
    found = inter_operator(np.stack([UNIT, UNIT / 2, UNIT / 4]), [1, 2, 4], 4, 8)
    assert found is not None
    assert found.value == 2 + 7 * 2 == 16
    assert found.stages == ((0, 8, 2),)


def test_activations_in_flight_decide_which_stages_fit():
    # each layer keeps one unit a microbatch, a device has 5: with 4 stages the first may hold one layer only
    room = np.floor(5.0 / ranges_of(np.ones(8)))
    found = inter_operator(UNIT[None], [1], 4, 8, most_in_flight=room[None])
    assert found is not None
    assert all((end - first) * (4 - stage) <= 5 for stage, (first, end, _) in enumerate(found.stages))
    assert found.value == 8 + 7 * 4


@pytest.mark.parametrize("seed", range(5))
def test_t_star_is_the_simulated_step_of_gpipe(seed):
    forward = np.random.default_rng(seed).uniform(0.5, 1.5, 6)
    found = inter_operator(ranges_of(3 * forward)[None], [1], 3, 5)
    assert found is not None
    stages = np.array([forward[first:end].sum() for first, end, _ in found.stages])
    schedule = generate("gpipe", ScheduleRequest(3, 5))
    assert simulate(
        schedule, StageCosts(stages, stages, stages, *np.zeros((3, len(stages))))
    ).makespan_s == pytest.approx(found.value, rel=1e-12)


def _gpt2_table(**pins: object) -> StageTable:
    """Return GPT-2 on eight A100 with two tensor-parallel devices a stage."""
    job = TrainingJob(global_batch=16, sequence_length=1024, space=SearchSpace(pins=Pins(tp=2, sp="off", **pins)))
    problem = Problem(resolve_model("gpt2"), resolve_cluster("a100-sxm-80g:8x1"), job, 8)
    reach = Reach(tensor=True)
    (configuration, *_) = configurations(problem, reach)
    return StageTable(problem, Candidate(configuration, rule_of(problem, reach), 1))


def test_the_intra_operator_programme_prices_a_block_no_higher_than_megatrons_split():
    """Half the work, and two all-reduces of the boundary tensor each way."""
    table = _gpt2_table(pp=2, microbatch=2)
    whole_s = 2.0
    megatron = whole_s / 2
    degrees = table.configuration.degrees
    group = table.problem.model(table.configuration.axis_order).rank_groups(degrees).tp
    megatron += 4 * collective_s("all-reduce", 2 * 1024 * 768 * 2.0, group)
    found = IntraOperator().block_s(table, whole_s)
    assert whole_s / 2 < found <= megatron * (1 + 1e-9)


def test_with_room_for_half_the_states_the_programme_splits_every_weight_by_heads_and_features():
    table = _gpt2_table(pp=2, microbatch=2)
    problem = block_problem(table, 2.0, float("inf"))
    weights = sum(problem.graph.size_bytes(name) for name in ("wq", "wk", "wv", "wo", "w1", "w2"))
    held = 0.55 * weights * problem.source_states + 2e8
    found = shard_layer(block_problem(table, 2.0, held))
    assert found.memory_bytes <= held
    assert {found.homes[name] for name in ("w1", "w2")} == {(split("f"),)}


def test_alpas_stage_costs_are_the_programmes_and_layers_beside_blocks_the_cost_models():
    table = _gpt2_table(pp=2, microbatch=2, zero=0)
    intra = IntraOperator()
    layer_s, blocks = intra.layer_s(table), block_layers(table)
    beside = np.setdiff1d(np.arange(table.num_layers), blocks)
    assert len(blocks) == 12
    assert layer_s[beside] == pytest.approx(table.costs.time_s[beside])
    assert (intra.least_s(table) <= layer_s * (1 + 1e-12)).all()
    outcome = make_plan(table.problem.profile, table.problem.cluster, table.problem.job, planner="alpa")
    assert outcome.plan is not None
    stages = [float(layer_s[slice(*stage.layers)].sum()) for stage in outcome.plan.stages if stage.layers is not None]
    reductions = [float(table.reduction_s[stage.layers]) for stage in outcome.plan.stages if stage.layers is not None]
    each = [t + r / table.num_microbatches for t, r in zip(stages, reductions, strict=True)]
    assert outcome.own_objective == pytest.approx(sum(each) + (table.num_microbatches - 1) * max(each), rel=1e-3)
