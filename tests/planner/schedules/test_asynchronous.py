"""Asynchronous schedules: bubbles, weight versions, rules on T, and the formulas of weight prediction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.avgpipe import elastic_step
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.pipedream import noam
from stagewright.planner.schedules.pipemare import forward_delay, learning_rate_factor
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.spectrain import version_difference as spectrain_difference
from stagewright.planner.schedules.weight_prediction import (
    adam_direction,
    adamw_direction,
    discrepancy_corrected,
    momentum_direction,
    predicted,
    rmsprop_direction,
)
from stagewright.planner.schedules.xpipe import PREDICTIONS_PER_MINIBATCH
from stagewright.planner.schedules.xpipe import version_difference as xpipe_difference
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate
from stagewright.planner.simulation.versions import weight_copies, weight_versions


def timed(name: str, ranks: int, microbatches: int, **parameters: int):
    schedule = generate(name, ScheduleRequest(ranks, microbatches, parameters=parameters))
    validate(schedule)
    chunks = schedule.num_stages // ranks
    return schedule, simulate(schedule, StageCosts.uniform(schedule.num_stages, num_chunks=chunks))


def test_pipedream_idles_under_one_and_a_half_percent_in_200_minibatches():
    schedule, timeline = timed("pipedream", 4, 200)
    assert timeline.bubble_over_total < 0.015
    assert weight_copies(schedule).tolist() == [4, 3, 2, 1]


STAGES_S = np.array([2.0, 1.0])


def test_two_workers_for_a_stage_of_twice_the_work_idle_under_one_and_a_half_percent_in_400_minibatches():
    schedule = generate("pipedream", ScheduleRequest(3, 400, parameters={"replicas": "2,1"}))
    validate(schedule)
    timeline = simulate(
        schedule,
        replace(StageCosts.uniform(2), **dict.fromkeys(("forward_s", "input_grad_s", "weight_grad_s"), STAGES_S)),
    )
    assert schedule.placement.tolist() == [[0, 2], [1, 2]]
    assert schedule.text(0)[:5] == ["0F0", "0F2", "0B0", "0F4", "0B2"]
    assert schedule.text(2)[:4] == ["1F0", "1B0", "1:1F1", "1:1B1"]
    assert timeline.bubble_over_total < 0.015
    assert weight_versions(schedule).tolist() == [[2, 1], [2, 0]]


@pytest.mark.parametrize(
    ("replicas", "ranks", "count", "message"),
    [
        ("2,1", 4, 4, r"2,1 are 3 workers on 4 ranks"),
        ("2,1", 3, 5, r"5 minibatches do not divide over the workers 2,1"),
        ("2,0", 2, 4, r"replicas is '2,0'"),
    ],
)
def test_workers_that_do_not_fit_ranks_or_minibatches_are_refused_with_both_numbers(replicas, ranks, count, message):
    with pytest.raises(InvalidArgument, match=message):
        generate("pipedream", ScheduleRequest(ranks, count, parameters={"replicas": replicas}))


def test_the_optimal_number_of_minibatches_in_flight_counts_the_input_stage():
    assert noam((15, 1)) == 2
    assert noam((1, 1, 1, 1)) == 4


def test_2bw_keeps_two_versions_everywhere_and_refuses_fewer_microbatches_than_ranks():
    schedule, _ = timed("2bw", 8, 8, updates=3)
    assert weight_copies(schedule).tolist() == [2] * 8
    assert schedule.num_microbatches == 24
    with pytest.raises(InvalidArgument, match=r"D = 8 .* 7 were"):
        generate("2bw", ScheduleRequest(8, 7))


def test_wpipe_keeps_half_as_many_extra_weights_as_2bw_and_bubbles_vanish():
    schedule, timeline = timed("wpipe", 4, 8, updates=40)
    assert weight_copies(schedule).tolist() == [1.5] * 4
    assert timeline.bubble_over_total < 0.03


def test_wpipe_updates_group_two_before_its_next_forward():
    schedule, _ = timed("wpipe", 4, 8, updates=4)
    for rank in range(4):
        texts = schedule.text(rank)
        for period in range(3):
            last_backward = texts.index(f"{rank + 4}B{8 * period + 7}")
            assert texts.index(f"{rank + 4}F{8 * (period + 1)}") > last_backward
            assert texts.index(f"{rank}F{8 * (period + 1)}") < texts.index(f"{rank}B{8 * period + 7}")


def test_ampnet_serves_messages_as_they_come_within_its_bound():
    schedule, timeline = timed("ampnet", 4, 12, max_active_keys=3)
    assert timeline.peak_memory().max() <= 3
    assert weight_copies(schedule).tolist() == [1] * 4


def test_avgpipe_holds_every_pipelines_weights_and_advancing_moves_its_peak():
    schedule, timeline = timed("avgpipe", 4, 8, pipelines=2)
    assert weight_copies(schedule).tolist() == [2] * 4
    assert timeline.peak_memory().tolist() == [8, 6, 4, 2]
    _, advanced = timed("avgpipe", 4, 8, pipelines=2, advance=8)
    assert advanced.peak_memory().tolist() == [16] * 4


def test_an_elastic_step_keeps_the_average_and_shrinks_the_distance():
    weights = np.array([[1.0, 4.0], [3.0, 0.0]])
    stepped = elastic_step(weights, 0.25)
    assert stepped.mean(axis=0).tolist() == weights.mean(axis=0).tolist()
    assert np.abs(stepped - stepped.mean(axis=0)).max() == pytest.approx(
        0.75 * np.abs(weights - weights.mean(axis=0)).max()
    )


def test_version_differences_follow_the_papers():
    assert [spectrain_difference(k, 4, backward=False) for k in range(4)] == [3, 2, 2, 1]
    assert [spectrain_difference(k, 4, backward=True) for k in range(4)] == [0, 0, 1, 1]
    assert [xpipe_difference(k, 4, 4, backward=False) for k in range(4)] == [1, 1, 1, 0]
    assert PREDICTIONS_PER_MINIBATCH == 2


def test_pipemare_delays_and_learning_rates_follow_the_paper():
    assert [forward_delay(stage, 4, 8) for stage in range(4)] == [7 / 8, 5 / 8, 3 / 8, 1 / 8]
    assert learning_rate_factor(4.0, 0, 100) == 0.25
    assert learning_rate_factor(4.0, 50, 100) == 0.5
    assert learning_rate_factor(4.0, 100, 100) == 1.0


def test_momentum_prediction_on_a_quadratic_errs_ten_times_less_than_none():
    curvature, rate, momentum, ahead = np.array([1.0, 0.3]), 0.002, 0.9, 3
    weights, velocity, trace = np.array([5.0, -4.0]), np.zeros(2), []
    for _ in range(60):
        trace.append((weights.copy(), velocity.copy()))
        velocity = momentum * velocity + curvature * weights
        weights = weights - rate * velocity
    errors = [
        (
            np.linalg.norm(trace[t + ahead][0] - predicted(trace[t][0], momentum_direction(trace[t][1]), ahead, rate)),
            np.linalg.norm(trace[t + ahead][0] - trace[t][0]),
        )
        for t in range(25, 50)
    ]
    assert sum(with_prediction for with_prediction, _ in errors) * 10 < sum(without for _, without in errors)


def test_steady_momentum_with_a_constant_gradient_is_predicted_exactly():
    velocity = np.array([2.0, -1.0]) / (1 - 0.9)
    weights, rate = np.array([1.0, 1.0]), 0.1
    later = weights
    for _ in range(4):
        later = later - rate * velocity
    assert predicted(weights, momentum_direction(velocity), 4, rate) == pytest.approx(later)


def test_each_optimizers_direction_is_its_own_next_step_for_a_constant_gradient():
    gradient, weights, step = np.array([0.5, -2.0]), np.array([1.0, 2.0]), 10
    first, second = gradient * (1 - 0.9**step), gradient**2 * (1 - 0.999**step)
    adam = adam_direction(first, second, step)
    assert adam == pytest.approx(np.sign(gradient), rel=1e-6)
    assert adamw_direction(weights, first, second, step, weight_decay=0.1) == pytest.approx(adam + 0.1 * weights)
    assert rmsprop_direction(gradient, gradient**2) == pytest.approx(np.sign(gradient), rel=1e-6)


def test_a_delayed_quadratic_diverges_alone_and_converges_with_pipemares_corrections():
    """w' = w - a l w(t - tau), tau = 4: unstable at a l = 0.6; the smaller rate of T1 brings it back, T2 keeps it there."""
    delay, rate, curvature = 4, 0.6, 1.0

    def final(rate_of_step, correct: bool) -> float:
        history, change = [1.0] * (delay + 1), 0.0
        for step in range(400):
            old = np.array([history[-1 - delay]])
            used = discrepancy_corrected(old, np.array([change]), -float(delay)) if correct else old
            history.append(history[-1] - rate_of_step(step) * curvature * float(used[0]))
            change = 0.9 * change + 0.1 * (history[-1] - history[-2])
        return abs(history[-1])

    assert final(lambda step: rate, correct=False) > 1e3
    annealed = final(lambda step: rate * learning_rate_factor(float(delay), 0, 400), correct=True)
    assert annealed < 1e-3
