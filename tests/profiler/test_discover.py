"""Discovery of this machine: as many ranks as cores, rates that were measured, and no claim about absent devices."""

import pytest
import torch

from stagewright.planner.cores import num_cores
from stagewright.planner.documents import Cluster, Source
from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.discover import available_memory_bytes, discover_local


@pytest.mark.ranks
def test_a_cpu_machine_has_a_rank_for_each_core_with_measured_rates(tmp_path):
    cluster = discover_local(device="cpu", measure_network=False, budget_s=0.3)
    (group,) = cluster.groups
    assert cluster.num_devices == num_cores()
    assert group.device.source is Source.MEASURED
    assert group.device.flops["fp32"] > 1e8
    assert max(point.share for point in group.device.matmul_efficiency) == 1.0
    assert 0 < group.device.memory_bytes * num_cores() <= available_memory_bytes() * 2
    cluster.save(tmp_path / "cluster.json")
    assert Cluster.load(tmp_path / "cluster.json").digest == cluster.digest


def test_more_devices_than_there_are_is_refused_with_both_numbers():
    with pytest.raises(InvalidArgument, match=f"{num_cores() + 1} devices asked for, {num_cores()} are here"):
        discover_local(device="cpu", max_devices=num_cores() + 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_cuda_device_is_not_invented():
    with pytest.raises(InvalidArgument, match="there is no CUDA device"):
        discover_local(device="cuda")
