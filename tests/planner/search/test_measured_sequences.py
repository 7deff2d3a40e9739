"""Sequence parallelism is searched over blocks that were measured whole and cut, and priced as the simulator does."""

from __future__ import annotations

import pytest

from stagewright.planner.documents import Recompute, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import evaluate
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

NUM_LAYERS, INPUT_BYTES, PARAMETERS = 4, 10e6, 100_000


def planned(memory_bytes: float, tensor_degrees: tuple[int, ...] = (1, 2), **pins: str) -> PlanOutcome:
    """Plan blocks that recompute all but their inputs, of which each of two devices holds the whole, or half with sp."""
    profile = profile_factory(
        NUM_LAYERS,
        forward_s=1e-3,
        parameters=PARAMETERS,
        activation_bytes=100e6,
        output_bytes=INPUT_BYTES,
        microbatches=(1,),
        tensor_degrees=tensor_degrees,
    )
    space = SearchSpace(
        schedules=("gpipe",), recompute=(Recompute.FULL,), pins=Pins(tp=2, pp=1, microbatch=1, **pins), zero=(0,)
    )
    job = TrainingJob(global_batch=1, sequence_length=128, precision="fp32", space=space)
    outcome = make_plan(profile, cluster_factory(2, memory_bytes=memory_bytes), job)
    if outcome.plan is not None:
        simulated = evaluate(outcome.plan, profile).prediction
        assert outcome.plan.prediction.step_time_s == pytest.approx(simulated.step_time_s, rel=1e-12)
        assert outcome.plan.prediction.peak_memory_bytes == pytest.approx(simulated.peak_memory_bytes, rel=1e-12)
    return outcome


def test_where_only_half_of_the_inputs_fit_sequences_are_split():
    """Of four kept inputs of 10 MB each device holds 40 MB, or 20 with sp; what a block makes again comes on top."""
    memory_bytes = 75e6 / 0.95
    assert planned(memory_bytes, sp="off").status == "infeasible"
    plan = planned(memory_bytes).plan
    assert plan is not None and plan.stages[0].degrees.sp
    assert plan.prediction.memory[0].activations == pytest.approx(NUM_LAYERS * INPUT_BYTES / 2)


def test_what_was_not_measured_whole_is_not_split():
    assert planned(1e9, (2,), sp="on").plan is None
    plan = planned(1e9, (2,)).plan
    assert plan is not None and not plan.stages[0].degrees.sp
