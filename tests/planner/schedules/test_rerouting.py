"""ReCycle: a lost rank's microbatches fit into its peers' bubbles."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.rerouting import rerouted
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, STAGE
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate


@pytest.mark.parametrize(("replicas", "stages"), [(2, 4), (3, 4), (4, 4), (4, 8)])
@pytest.mark.parametrize("lost_stage", [0, 1, -1])
def test_a_lost_rank_costs_less_than_its_share_of_the_replicas(replicas, stages, lost_stage):
    costs = StageCosts.uniform(stages)
    count = replicas * max(replicas - 1, stages // 2)
    lost = (0, lost_stage % stages)
    whole = rerouted(costs, num_replicas=replicas, num_microbatches=count, lost=None)
    short = rerouted(costs, num_replicas=replicas, num_microbatches=count, lost=lost)
    validate(whole)
    validate(short)
    assert short.num_ranks == whole.num_ranks - 1
    before_s, after_s = simulate(whole, costs).makespan_s, simulate(short, costs).makespan_s
    assert after_s / before_s - 1 < 1 / replicas


def test_every_microbatch_visits_every_stage_once_and_only_peers_take_more():
    costs = StageCosts.uniform(4)
    schedule = rerouted(costs, num_replicas=3, num_microbatches=12, lost=(1, 2))
    rows = np.concatenate(schedule.orders)
    forwards = rows[rows[:, KIND] == Kind.F]
    assert sorted(map(tuple, forwards[:, [MICROBATCH, STAGE]].tolist())) == [
        (m, s) for m in range(12) for s in range(4)
    ]
    counts = [int((order[:, KIND] == Kind.F).sum()) for order in schedule.orders]
    assert counts == [4, 4, 6, 4, 4, 4, 4, 4, 4, 6, 4]  # rank 6, stage 2 of replica 1, is gone


def test_what_cannot_be_rerouted_is_refused_with_the_numbers():
    costs = StageCosts.uniform(4)
    with pytest.raises(InvalidArgument, match="only replica lost a rank"):
        rerouted(costs, num_replicas=1, num_microbatches=4, lost=(0, 0))
    with pytest.raises(InvalidArgument, match=r"\(3, 0\) was lost, there are 3 replicas of 4 stages"):
        rerouted(costs, num_replicas=3, num_microbatches=12, lost=(3, 0))
    with pytest.raises(InvalidArgument, match="5 microbatches for 6 routes"):
        rerouted(costs, num_replicas=3, num_microbatches=5, lost=(0, 0))
