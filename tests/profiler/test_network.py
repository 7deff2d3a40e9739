"""The network sweep over real local ranks, and what its raw numbers become."""

import pytest

from stagewright.planner.documents import Source
from stagewright.planner.errors import RunFailed
from stagewright.profiler.network import OPERATIONS, bus_factor, network_profile_of, profile_network


def raw(points, compute=1.0, communication=1.0):
    return {"points": points, "compute_slowdown": compute, "communication_slowdown": communication}


def test_the_slowest_rank_counts():
    ranks = [
        raw([["send-receive", 1024, 1e-5, 9], ["send-receive", 2048, 2e-5, 9]]),
        raw([["send-receive", 1024, 3e-5, 9], ["send-receive", 2048, 4e-5, 9]], compute=1.5),
    ]
    profile = network_profile_of(ranks, 2)
    assert [point.seconds for point in profile.points] == [3e-5, 4e-5]
    assert profile.compute_slowdown == 1.5
    assert profile.level("loopback", 2).overlap_slowdown == 1.5


def test_a_disturbed_small_message_does_not_make_small_messages_slow():
    """A disturbance only adds time, so no message takes longer than a larger one."""
    times = {1024: 5e-3, 2048: 1e-5, 4096: 1.1e-5, 8192: 1.2e-5}
    profile = network_profile_of([raw([["send-receive", size, value, 3] for size, value in times.items()])], 2)
    assert profile.fits["send-receive"].seconds(1024) < 2e-5


def test_bus_bandwidth_follows_the_convention_of_nccl_tests():
    assert bus_factor("all-reduce", 4) == 1.5
    assert bus_factor("all-gather", 4) == bus_factor("reduce-scatter", 4) == bus_factor("all-to-all", 4) == 0.75
    assert bus_factor("send-receive", 4) == 1.0


def test_without_send_receive_there_is_no_link():
    with pytest.raises(RunFailed, match="no send-receive"):
        network_profile_of([raw([["all-reduce", 1024, 1e-5, 3], ["all-reduce", 2048, 1e-5, 3]])], 2)


@pytest.mark.ranks
def test_two_local_ranks_measure_every_operation():
    profile = profile_network(2, sizes_bytes=(1024, 65536, 2**20), budget_s=0.3, overlap=True)
    assert {point.operation for point in profile.points} == set(OPERATIONS)
    assert len(profile.points) == 3 * len(OPERATIONS)
    level = profile.level("loopback", 2)
    assert level.source is Source.MEASURED
    assert set(level.collectives) == set(OPERATIONS) - {"send-receive"}
    assert level.overlap_slowdown >= 1.0
    assert 0.0 <= level.processor_latency_s < 0.1
    assert level.processor_bytes_per_s is None or level.processor_bytes_per_s > 1e6


def test_the_ends_of_messages_lie_on_a_line():
    ranks = [
        {**raw([["send-receive", 1024, 1e-5, 9], ["send-receive", 2048, 2e-5, 9]]), "processor": points}
        for points in ([(1000, 1.1e-4), (1_000_000, 3.1e-4)], [(1000, 0.9e-4), (1_000_000, 2.9e-4)])
    ]
    level = network_profile_of(ranks, 2).level("loopback", 2)
    assert level.processor_bytes_per_s == pytest.approx(999_000 / 2e-4)
    assert level.processor_latency_s == pytest.approx(1e-4, rel=0.01)


def test_larger_messages_that_seem_cheaper_take_what_all_do():
    ranks = [
        {**raw([["send-receive", 1024, 1e-5, 9], ["send-receive", 2048, 2e-5, 9]]), "processor": [(1, 3e-4), (9, 1e-4)]}
    ]
    level = network_profile_of(ranks, 2).level("loopback", 2)
    assert (level.processor_latency_s, level.processor_bytes_per_s) == (pytest.approx(2e-4), None)
