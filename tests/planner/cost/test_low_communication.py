"""DiLoCo: traffic divided by the local steps, and an outer step that is synchronous averaging at its simplest."""

import numpy as np
import pytest

from stagewright.planner.cost.low_communication import diloco_traffic, outer_step
from stagewright.planner.errors import InvalidArgument


def test_local_steps_divide_the_traffic_and_fragments_the_peak():
    every_step = diloco_traffic(1e9, 8, local_steps=1)
    rare = diloco_traffic(1e9, 8, local_steps=500)
    streamed = diloco_traffic(1e9, 8, local_steps=500, fragments=5)
    assert every_step.mean_bytes == every_step.peak_bytes == pytest.approx(2 * 7 / 8 * 4e9)
    assert rare.mean_bytes == pytest.approx(every_step.mean_bytes / 500)
    assert rare.peak_bytes == every_step.peak_bytes
    assert (streamed.mean_bytes, streamed.peak_bytes) == pytest.approx((rare.mean_bytes, rare.peak_bytes / 5))
    with pytest.raises(InvalidArgument, match="3 fragments do not divide 500 local steps"):
        diloco_traffic(1e9, 8, local_steps=500, fragments=3)


def _quadratic_gradient(weights, centre):
    return 2.0 * (weights - centre)


def test_one_local_step_without_momentum_is_synchronous_training():
    rng = np.random.default_rng(0)
    centres, synchronous = rng.normal(size=(4, 3)), rng.normal(size=3)
    shared, velocity = synchronous.copy(), np.zeros(3)
    for _ in range(20):
        replicas = np.array([shared - 0.1 * _quadratic_gradient(shared, centre) for centre in centres])
        shared, velocity = outer_step(shared, replicas, velocity, learning_rate=1.0, momentum=0.0)
        synchronous = synchronous - 0.1 * np.mean([_quadratic_gradient(synchronous, c) for c in centres], axis=0)
    assert shared == pytest.approx(synchronous, rel=1e-12)


def test_the_outer_step_is_nesterovs_recurrence_on_the_mean_change():
    rng = np.random.default_rng(1)
    shared, velocity = rng.normal(size=5), np.zeros(5)
    expected, buffer = shared.copy(), np.zeros(5)
    for _ in range(10):
        changes = rng.normal(size=(3, 5))
        shared, velocity = outer_step(shared, shared + changes, velocity, learning_rate=0.7, momentum=0.9)
        gradient = -changes.mean(axis=0)
        buffer = 0.9 * buffer + gradient
        expected = expected - 0.7 * (gradient + 0.9 * buffer)
    assert shared == pytest.approx(expected, rel=1e-12)
