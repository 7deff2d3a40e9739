"""Weights that change under way follow the recurrence of their paper, exactly, in one process as on many ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import LENGTH, Case, make_model, prepare
from runtime_documents import profile_of

from stagewright.modeling import split
from stagewright.planner.prediction import evaluate
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


@pytest.fixture(scope="module")
def wide(rank_pools):
    """Plan, profile and measured peaks by schedule of a model whose weights outweigh its activations."""
    pool = rank_pools(2)

    def run(schedule, parameters):
        case = Case(schedule, 2, 4, parameters=parameters, tied=False, dropout=0.0, width=256)
        prepared = prepare(case, pool.next_number())
        profile = profile_of(split(make_model(case, 4)), sequence_length=LENGTH)
        return prepared.plan, profile, pool.run("peak_memory", prepared)

    return run


@pytest.fixture(scope="module")
def unpredicted(wide):
    """Bytes on each rank that no prediction from a mocked profile holds: activations and workspace of a synchronous run."""
    plan, profile, measured = wide("1f1b", {})
    predicted = evaluate(plan, profile).prediction.peak_memory_bytes
    return [found - told for found, told in zip(measured, predicted, strict=True)]


@pytest.mark.parametrize(
    ("schedule", "parameters", "copies", "pipelines"),
    [
        ("pipedream", {}, 2, 1),  # two microbatches under way on rank 0, each with a version of its own
        ("2bw", {}, 2, 1),
        ("ampnet", {}, 1, 1),
        ("spectrain", {}, 1, 1),
        ("pipemare", {"updates": 3}, 3, 1),  # the copy, the average of its changes, and a note before an update
        ("avgpipe", {"advance": 1}, 2, 2),  # two pipelines on each rank
    ],
)
def test_weight_versions_are_predicted_as_a_run_holds_them(wide, unpredicted, schedule, parameters, copies, pipelines):
    plan, profile, measured = wide(schedule, parameters)
    prediction = evaluate(plan, profile).prediction
    for rank, found in enumerate(measured):
        first, last = plan.stages[rank].layers
        weights = 4.0 * sum(profile.classes[name].parameters for name in profile.layer_classes[first:last])
        if rank == 0:
            # The note comes as the activations of a microbatch are gone.
            assert prediction.memory[rank].weight_versions == pytest.approx(copies * weights, rel=1e-3)
        # Two pipelines have activations of their own, and one workspace; a message may be on its way at the peak or not.
        rest = found - prediction.peak_memory_bytes[rank]
        assert unpredicted[rank] - 0.1 * weights <= rest <= pipelines * unpredicted[rank] + 0.1 * weights
