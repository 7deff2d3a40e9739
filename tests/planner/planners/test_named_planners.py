"""What holds for every named planner: its plans fit, lie in the exact planner's space, and are scored by the simulator."""

from __future__ import annotations

import pytest

from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.planners.registry import NamedPlanner, planners
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import evaluate
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

LAYERS = 7
PROFILE = profile_factory(
    forward_s=[1e-3, 2e-3, 1.5e-3, 0.5e-3, 1e-3, 2.5e-3, 1e-3],
    parameters=[500_000, 1_000_000, 200_000, 800_000, 1_000_000, 2_000_000, 100_000],
    activation_bytes=[4e6, 6e6, 3e6, 8e6, 5e6, 4e6, 2e6],
    tensor_degrees=(1, 2, 4),
    microbatches=(1, 2, 4),
)
JOB = TrainingJob(
    global_batch=16,
    sequence_length=128,
    precision="fp32",
    space=SearchSpace(schedules=("1f1b", "gpipe"), max_microbatch=4),
)
ROOM_BYTES = {"roomy": 1e9, "binding": 80e6}
ANY_SCHEDULE = ("megatron", "random", "flexflow", "device-placement")
NAMED = [row for row in planners() if row.name not in ("exact", "exhaustive")]


@pytest.fixture(scope="module", params=sorted(ROOM_BYTES))
def cluster(request):
    return cluster_factory(4, 1, memory_bytes=ROOM_BYTES[request.param])


@pytest.fixture(scope="module")
def exact(cluster) -> PlanOutcome:
    return make_plan(PROFILE, cluster, JOB, gap=0.0, top=0)


@pytest.mark.parametrize("row", NAMED, ids=lambda row: row.name)
def test_a_named_plan_fits_and_is_no_faster_than_the_exact_one(row: NamedPlanner, cluster, exact):
    outcome = make_plan(PROFILE, cluster, JOB, planner=row.name, top=0)
    assert outcome.status in ("feasible", "no_solution")
    if outcome.plan is None:
        return
    again = evaluate(outcome.plan, PROFILE).prediction
    assert outcome.objective_s == again.step_time_s == outcome.plan.prediction.step_time_s
    assert max(again.peak_memory_bytes) <= cluster.groups[0].device.memory_bytes * 0.95 * (1 + 1e-12)
    assert outcome.plan.planner == row.name
    assert exact.bound_s <= outcome.objective_s * (1 + 1e-9)


@pytest.mark.parametrize("row", NAMED, ids=lambda row: row.name)
def test_with_room_every_named_planner_answers_and_twice_the_same(row: NamedPlanner):
    answers = [make_plan(PROFILE, cluster_factory(4, 1), JOB, planner=row.name, top=0) for _ in range(2)]
    assert answers[0].plan is not None
    assert answers[0].plan == answers[1].plan
    assert answers[0].own_objective == answers[1].own_objective


@pytest.mark.parametrize("row", [row for row in NAMED if row.name not in ANY_SCHEDULE], ids=lambda row: row.name)
def test_a_planner_says_when_its_schedule_is_not_allowed(row: NamedPlanner):
    job = JOB.model_copy(update={"space": SearchSpace(schedules=("zb-h1",))})
    with pytest.raises(InvalidArgument, match="this planner runs"):
        make_plan(PROFILE, cluster_factory(4, 1), job, planner=row.name)
