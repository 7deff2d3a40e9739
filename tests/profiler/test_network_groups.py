"""Several nodes: the groups of each level, measured by real ranks, alone and under torchrun."""

import os
import subprocess
import sys

import pytest

from stagewright.planner.documents import Cluster
from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.network import OPERATIONS
from stagewright.profiler.network_groups import Job, job_of, links_of, profile_local_levels


def test_ranks_of_a_node_and_ranks_of_one_place_form_the_groups():
    levels = Job(0, 4, 2).levels
    assert levels == {"node": ((0, 1), (2, 3)), "network": ((0, 2), (1, 3))}
    assert list(Job(0, 2, 2).levels) == ["node"]
    assert list(Job(0, 2, 1).levels) == ["network"]


def test_nodes_of_unequal_size_are_refused():
    with pytest.raises(InvalidArgument, match="5 ranks do not make nodes of 2"):
        Job(0, 5, 2)


def test_a_job_is_known_from_what_torchrun_sets():
    assert job_of({}) is None
    assert job_of({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert job_of({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}) == Job(3, 4, 2)


@pytest.mark.ranks
def test_every_level_is_measured_over_its_own_groups():
    profiles = profile_local_levels(4, 2, sizes_bytes=(1024, 65536), budget_s=0.2)
    assert list(profiles) == ["node", "network"]
    for profile in profiles.values():
        assert profile.num_ranks == 2
        assert {point.operation for point in profile.points} == set(OPERATIONS)
    links = links_of(Job(0, 4, 2), profiles)
    assert [(link.name, link.num_devices) for link in links] == [("node", 2), ("network", 4)]


@pytest.mark.ranks
def test_torchrun_gives_the_cluster_of_the_whole_job(tmp_path):
    output = tmp_path / "cluster.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "stagewright", "profile", "network", "--device", "cpu", "--budget", "1", "-o", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (group,) = Cluster.load(output).groups
    assert (group.num_nodes, group.devices_per_node) == (1, 2)
    assert set(group.links[0].collectives) == set(OPERATIONS) - {"send-receive"}
