"""Weights that change under way follow the recurrence of their paper, exactly, in one process as on many ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, prepare

from stagewright.runtime.optimizers import OptimizerChoice

pytestmark = pytest.mark.ranks

MOMENTUM = OptimizerChoice("sgd-momentum", 0.1)
ADAM = OptimizerChoice("adam", 0.01)

CASES = [  # schedule, parameters, optimizer
    ("pipedream", {}, MOMENTUM),
    ("2bw", {}, MOMENTUM),
    ("2bw", {"updates": 3}, ADAM),
    ("wpipe", {"updates": 3}, MOMENTUM),
    ("ampnet", {}, MOMENTUM),
    ("spectrain", {}, MOMENTUM),
    ("xpipe", {"updates": 3}, ADAM),
    ("pipemare", {"updates": 3}, MOMENTUM),
    ("avgpipe", {"advance": 1, "elastic_rate": 0.2}, MOMENTUM),
]


@pytest.mark.parametrize(("schedule", "parameters", "optimizer"), CASES, ids=lambda value: str(value)[:24])
def test_asynchronous_weights_follow_the_recurrence_in_one_process(rank_pools, schedule, parameters, optimizer):
    for ranks, microbatches in ((2, 4), (4, 6)):
        pool = rank_pools(ranks)
        case = Case(
            schedule, ranks, microbatches, parameters=parameters, tied=False, dropout=0.0, dtype="float64", num_steps=2
        )
        for error in pool.run("delayed_weights", (prepare(case, pool.next_number()), optimizer)):
            assert error <= 1e-10


@pytest.mark.parametrize(
    ("workers", "minibatches"),
    [("2,1", 6), ("1,2", 6), ("3,1", 9), ("2,1,1", 8), ("1,2,1", 8)],
)
def test_stages_with_workers_of_their_own_follow_the_recurrence_round_robin(rank_pools, workers, minibatches):
    ranks = sum(int(count) for count in workers.split(","))
    pool = rank_pools(ranks)
    case = Case(
        "pipedream", ranks, minibatches, parameters={"replicas": workers}, tied=False, dropout=0.0, dtype="float64"
    )
    for error in pool.run("delayed_weights", (prepare(case, pool.next_number()), MOMENTUM)):
        assert error <= 1e-10


def test_stale_weights_are_not_those_of_synchronous_training(rank_pools):
    pool = rank_pools(2)
    case = Case("pipedream", 2, 4, tied=False, dropout=0.0, dtype="float64", num_steps=2)
    synchronous = Case("1f1b", 2, 4, tied=False, dropout=0.0, dtype="float64", num_steps=2)
    stale = pool.run("gradients_and_weights", prepare(synchronous, pool.next_number()))
    assert stale[0].weights.max_relative_error <= 1e-10
    delayed = pool.run("gradients_and_weights", prepare(case, pool.next_number()))
    assert max(result.weights.max_relative_error for result in delayed) > 1e-3
