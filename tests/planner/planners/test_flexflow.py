"""FlexFlow: delta simulation is the full one, walks repeat by seed and come near the optimum; annealing as a baseline."""

from __future__ import annotations

from random import Random

import pytest

from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planners.flexflow import Chain, DeltaSimulation
from stagewright.planner.planning import make_plan
from stagewright.planner.search.brute_force import best_completion
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

PROFILE = profile_factory(
    forward_s=[1e-3, 2e-3, 1.5e-3, 0.5e-3, 1e-3, 2.5e-3, 1e-3, 0.7e-3],
    activation_bytes=[4e6, 6e6, 3e6, 8e6, 5e6, 4e6, 2e6, 3e6],
)


def question(schedule: str, *, memory_bytes: float = 1e9, ranks: int = 4) -> Problem:
    space = SearchSpace(schedules=(schedule,), pins=Pins(pp=ranks, microbatch=1))
    job = TrainingJob(global_batch=8, sequence_length=128, precision="fp32", space=space)
    return Problem(PROFILE, cluster_factory(4, 1, memory_bytes=memory_bytes), job, 4)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "zb-v", "chimera"])
def test_delta_simulation_equals_full_simulation_along_a_walk(schedule):
    problem = question(schedule)
    candidate = problem.candidates()[0]
    chain, order = Chain(problem, [candidate], Random(0)), problem.order(candidate)
    delta, state, fewer = DeltaSimulation(order), chain.start(candidate), 0
    for _ in range(60):
        state = chain.propose(state)
        pipeline = problem.pipeline(*state)
        assert delta.makespan(pipeline) == order.makespan(pipeline.costs, pipeline.hop_s, pipeline.tail_s)
        fewer += delta.num_run < order.num_actions
    assert fewer > 0


@pytest.mark.parametrize("memory_bytes", [1e9, 64e6])
def test_a_walk_comes_within_2_percent_of_the_optimum_and_repeats_by_seed(memory_bytes):
    problem = question("1f1b", memory_bytes=memory_bytes)
    candidate = problem.candidates()[0]
    best = best_completion(problem, candidate)
    assert best is not None
    walks = []
    for _ in range(2):
        chain = Chain(problem, [candidate], Random(3))
        walks.append(chain.walk(chain.start(candidate), 1500, Limits()))
    assert walks[0] == walks[1]
    assert best[0] * (1 - 1e-9) <= walks[0][0] <= 1.02 * best[0]


def test_annealed_placement_beats_one_device_and_not_the_exact_planner():
    job = TrainingJob(
        global_batch=16, sequence_length=128, precision="fp32", space=SearchSpace(schedules=("1f1b", "gpipe"))
    )
    cluster = cluster_factory(4, 1)
    alone = make_plan(PROFILE, cluster, job, num_devices=1, gap=0.0, top=0)
    exact = make_plan(PROFILE, cluster, job, gap=0.0, top=0)
    found = make_plan(PROFILE, cluster, job, planner="spotlight", top=0)
    assert exact.objective_s * (1 - 1e-9) <= found.objective_s < 0.9 * alone.objective_s
