"""Schedules whose stages form a graph: the vocabulary cut over all ranks, and PipeFB's two ranks for a stage."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.pipefb import halved
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import KIND, STAGE
from stagewright.planner.schedules.vocabulary import vocabulary_costs
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.timeline import Timeline
from stagewright.planner.simulation.validate import validate

SHORT_S = 1e-6


def _vocabulary(num_ranks: int, num_microbatches: int, algorithm: int) -> Timeline:
    """Blocks of two layers, each F = I = W = 1, and an output layer as long as two layers."""
    blocks = StageCosts.of(*np.full((3, num_ranks), 2.0))
    layer = StageCosts.of([2.0], [2.0], [2.0], activation=[0.0])
    costs = vocabulary_costs(blocks, layer, SHORT_S, algorithm=algorithm)
    schedule = generate(
        "1f1b-vocab",
        ScheduleRequest(num_ranks, num_microbatches, costs=costs, parameters={"algorithm": algorithm}),
    )
    validate(schedule, costs=costs)
    return simulate(schedule, costs)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize(("algorithm", "barriers"), [(1, 2), (2, 1)])
def test_the_first_rank_holds_one_activation_more_for_each_barrier(num_ranks, algorithm, barriers):
    """The paper's building blocks: D + 2 activations with two barriers, D + 1 with one."""
    timeline = _vocabulary(num_ranks, 4 * num_ranks, algorithm)
    assert timeline.peak_memory().tolist() == [num_ranks - rank + barriers for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [4, 8])
@pytest.mark.parametrize("algorithm", [1, 2])
def test_a_vocabulary_of_two_layers_brings_the_longest_rank_to_the_mean(num_ranks, algorithm):
    count = 4 * num_ranks
    timeline = _vocabulary(num_ranks, count, algorithm)
    mean_s = count * (6.0 + 6.0 / num_ranks)
    assert timeline.busy_s() == pytest.approx(np.full(num_ranks, mean_s), rel=1e-3)
    on_last = np.full(num_ranks, 2.0)
    on_last[-1] = 4.0
    late = simulate(generate("1f1b", ScheduleRequest(num_ranks, count)), StageCosts.of(on_last, on_last, on_last))
    assert late.busy_s().max() == count * 12.0
    assert timeline.makespan_s <= mean_s + 2 * (num_ranks - 1) * 6.0 + 1e-3  # 1F1B's own fill is (D - 1) (F + B)
    assert timeline.makespan_s < 0.75 * late.makespan_s


def _v_half_costs(num_ranks: int, algorithm: int) -> StageCosts:
    """Two blocks of one layer on each rank, each F = I = W = 1, and an output layer as long as two layers."""
    blocks = StageCosts.of(*np.ones((3, 2 * num_ranks)), activation=np.full(2 * num_ranks, 0.5))
    layer = StageCosts.of([2.0], [2.0], [2.0], activation=[0.0])
    return vocabulary_costs(blocks, layer, SHORT_S, algorithm=algorithm, num_parts=num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(("algorithm", "barriers"), [(1, 2), (2, 1)])
def test_v_half_with_the_vocabulary_holds_half_of_1f1bs_and_keeps_all_ranks_at_the_mean(num_ranks, algorithm, barriers):
    count = 4 * num_ranks
    costs = _v_half_costs(num_ranks, algorithm)
    told = {"algorithm": algorithm}
    schedule = generate("v-half-vocab", ScheduleRequest(num_ranks, count, costs=costs, parameters=told))
    validate(schedule, costs=costs)
    timeline = simulate(schedule, costs)
    peaks = timeline.peak_memory()
    assert peaks.max() <= (num_ranks + 2) // 2 + barriers
    assert num_ranks < 8 or peaks.max() <= 0.67 * _vocabulary(num_ranks, count, algorithm).peak_memory().max()
    mean_s = count * (6.0 + 6.0 / num_ranks)
    assert timeline.busy_s() == pytest.approx(np.full(num_ranks, mean_s), rel=1e-3)
    assert timeline.makespan_s <= mean_s + (num_ranks - 1) * 6.0  # 1F1B's fill
    on_last = np.ones(2 * num_ranks)
    on_last[-1] = 3.0
    whole = StageCosts.of(on_last, on_last, on_last, activation=costs.activation[: 2 * num_ranks])
    late = simulate(generate("v-half", ScheduleRequest(num_ranks, count, costs=whole)), whole)
    assert timeline.makespan_s < 0.8 * late.makespan_s


@pytest.mark.parametrize("num_ranks", [2, 4, 7])
def test_v_half_with_the_vocabulary_fits_the_memory_of_v_half_alone(num_ranks):
    costs, cap = _v_half_costs(num_ranks, 1), float((num_ranks + 2) // 2)
    schedule = generate("v-half-vocab", ScheduleRequest(num_ranks, 3 * num_ranks, costs=costs, memory_cap=cap))
    assert simulate(schedule, costs).peak_memory().max() <= cap
    with pytest.raises(InvalidArgument, match=f"holds .* the cap is {cap - 1:g}"):
        generate("v-half-vocab", ScheduleRequest(num_ranks, 3 * num_ranks, costs=costs, memory_cap=cap - 1))


def test_the_vocabulary_refuses_costs_of_another_number_of_stages():
    with pytest.raises(InvalidArgument, match=r"costs hold 4 stages, 4 blocks, 4 parts of the vocabulary .* are 9"):
        generate("1f1b-vocab", ScheduleRequest(4, 8, costs=StageCosts.uniform(4)))
    with pytest.raises(InvalidArgument, match=r"algorithm is 3, there are 1 and 2"):
        generate("1f1b-vocab", ScheduleRequest(4, 8, parameters={"algorithm": 3}))


def _pipefb(num_ranks: int, num_microbatches: int, activation: np.ndarray | None = None) -> Timeline:
    costs = StageCosts.of(*np.ones((3, num_ranks)), activation=activation)
    costs = halved(costs, receive_s=SHORT_S)
    schedule = generate("pipefb", ScheduleRequest(num_ranks, num_microbatches, costs=costs))
    validate(schedule, costs=costs)
    return simulate(schedule, costs)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8])
def test_both_waves_run_the_same_way_and_save_the_way_back(num_ranks):
    """T (F + B) + (D - 1) B at T = D, where 1F1B takes (T + D - 1) (F + B)."""
    timeline = _pipefb(num_ranks, num_ranks)
    assert timeline.makespan_s == pytest.approx(num_ranks * 3 + (num_ranks - 1) * 2, abs=1e-3)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 8), (3, 9), (4, 16), (8, 16)])
def test_more_microbatches_take_no_longer_than_in_1f1b(num_ranks, num_microbatches):
    makespan_s = _pipefb(num_ranks, num_microbatches).makespan_s
    assert makespan_s >= num_microbatches * 3 + (num_ranks - 1) * 2
    assert makespan_s <= (num_microbatches + num_ranks - 1) * 3 + 1e-3


@pytest.mark.parametrize("stage", range(4))
def test_a_stage_is_held_where_its_backward_runs_alone(stage):
    activation = np.zeros(4)
    activation[stage] = 1.0
    peaks = _pipefb(4, 8, activation).peak_memory()
    assert np.flatnonzero(peaks).tolist() == [3 - stage]
    order = generate("pipefb", ScheduleRequest(4, 8)).orders[stage]
    assert (order[(order[:, KIND] == Kind.F), STAGE] == stage).sum() == 8
