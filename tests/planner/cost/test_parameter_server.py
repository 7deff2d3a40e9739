"""Parameter servers: barriers, bounded staleness, and the rules for another batch."""

import numpy as np
import pytest

from stagewright.planner.cost import parameter_server as ps
from stagewright.planner.errors import InvalidArgument


def hiccups():
    """Four workers, each slow in another iteration."""
    seconds = np.ones((8, 4))
    for index in range(8):
        seconds[index, index % 4] = 3.0
    return seconds


def test_a_barrier_pays_for_the_slowest_worker_of_every_iteration():
    assert ps.mean_iteration_s(hiccups(), 0.5) == pytest.approx(3.5)


def test_staleness_hides_hiccups_and_never_a_slow_worker():
    times = [ps.mean_iteration_s(hiccups(), 0.5, staleness=s) for s in (0, 1, 2, 3)]
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0]
    free = ps.mean_iteration_s(hiccups(), 0.5, staleness=None)
    assert free == pytest.approx((6 * 1 + 2 * 3) / 8 + 0.5)
    slow = np.ones((20, 2))
    slow[:, 1] = 2.0
    assert ps.mean_iteration_s(slow, 0.0, staleness=3) == pytest.approx(2.0)


def test_no_worker_is_further_ahead_than_the_staleness():
    slow = np.ones((20, 2))
    slow[:, 1] = 5.0
    ends = ps.iteration_ends(slow, 0.0, staleness=2)
    for iteration in range(3, 20):
        start = ends[iteration, 0] - 1.0
        assert start >= ends[iteration - 3, 1] - 1e-12


def test_a_negative_staleness_is_refused():
    with pytest.raises(InvalidArgument, match="staleness is -1"):
        ps.iteration_ends(np.ones((1, 1)), 0.0, staleness=-1)


def test_a_worker_moves_two_psi():
    assert ps.traffic_bytes(10.0) == 20.0


def test_waves_add_up_to_a_global_staleness():
    # s_global = (D + 1)(s_local + 1) + s_local - 1, s_local = Nm - 1
    assert ps.wave_staleness(3, 0) == 4 + 3 - 1
    assert ps.wave_staleness(0, 1) == 1


def test_the_learning_rate_follows_the_batch():
    assert ps.learning_rate(0.1, base_batch=256, batch=8192) == pytest.approx(3.2)
    assert ps.learning_rate(0.1, base_batch=256, batch=1024, rule="root") == pytest.approx(0.2)
    assert ps.warmed_up(1.0, 0, 4) == 0.25
    assert ps.warmed_up(1.0, 9, 4) == 1.0
    with pytest.raises(InvalidArgument, match="no rule 'cubic'"):
        ps.learning_rate(0.1, base_batch=1, batch=2, rule="cubic")


def test_trust_ratios_scale_each_layer_by_its_norms():
    assert ps.trust_ratios([10.0, 0.0, 4.0], [2.0, 1.0, 0.0], weight_decay=0.1, trust=1.0) == [10.0 / 3.0, 1.0, 1.0]
