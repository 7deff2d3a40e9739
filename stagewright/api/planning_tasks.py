"""The tasks of the solver processes: solve, simulate, validate, from JSON to JSON by way of the planner.

The planner's compiled parts are imported inside the functions: the server names these functions and never runs them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from stagewright.api.names import cluster_of, profile_of
from stagewright.api.requests import SimulationRequest
from stagewright.api.tasks import TaskContext
from stagewright.planner.documents.document import canonical_json
from stagewright.planner.documents.request import PlanRequest

if TYPE_CHECKING:
    from stagewright.planner.simulation.timeline import Timeline

MAX_SPANS = 400_000
"""A longer timeline is not sent: it would be tens of megabytes of JSON."""

_SMALL_QUESTION = {
    "model": "gpt2",
    "cluster": "a100-sxm-80g:2x1",
    "job": {
        "global_batch": 2,
        "sequence_length": 128,
        "space": {"pins": {"pp": 2, "microbatch": 1, "schedule": "1f1b", "recompute": "none", "zero": 0}},
    },
}


def prepare() -> None:
    """Plan and simulate a small question, so that compiled code is loaded, or made on a machine's first start."""
    from stagewright.planner.planning import make_plan
    from stagewright.planner.prediction import evaluate

    request = PlanRequest.from_object(_SMALL_QUESTION)
    profile = profile_of(request.model)
    outcome = make_plan(profile, cluster_of(request.cluster), request.job, top=0)
    if outcome.plan is not None:
        evaluate(outcome.plan, profile)


def solve(argument: str, context: TaskContext) -> str:
    """Return the PlanOutcome of a PlanRequest, both as JSON."""
    from stagewright.planner.planning import make_plan

    request = PlanRequest.from_object(json.loads(argument))
    outcome = make_plan(
        profile_of(request.model),
        cluster_of(request.cluster),
        request.job,
        planner=request.planner,
        num_devices=request.devices,
        top=request.top,
        deadline_s=context.remaining_s,
        progress=context.report,
        should_stop=context.should_stop,
    )
    return outcome.canonical_json()


def simulate(argument: str, _context: TaskContext) -> str:
    """Return the SimulationReport of a SimulationRequest, both as JSON."""
    from stagewright.planner.plan_check import memory_limits
    from stagewright.planner.prediction import evaluate

    request = SimulationRequest.from_object(json.loads(argument))
    evaluation = evaluate(request.plan, profile_of(request.model))
    num_spans = len(evaluation.timeline.start_s)
    report = {
        "prediction": evaluation.prediction.model_dump(mode="json"),
        "timeline": None,
        "num_spans": num_spans,
        "memory_limit_bytes": memory_limits(request.plan),
    }
    if request.timeline and num_spans <= MAX_SPANS:
        report["timeline"] = spans(evaluation.timeline, evaluation.prediction.peak_memory_bytes)
    return canonical_json(report)


def validate(argument: str, _context: TaskContext) -> str:
    """Return the ValidationReport of a ValidationRequest that holds a plan, both as JSON."""
    from stagewright.api.validation import plan_report

    return canonical_json(plan_report(json.loads(argument)).model_dump(mode="json"))


def spans(timeline: Timeline, peak_bytes: tuple[float, ...]) -> dict[str, object]:
    """Return a timeline in columns; memory is lifted by what never changes, so that its peak is the predicted one."""
    from stagewright.planner.schedules.action import Kind
    from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, STAGE
    from stagewright.planner.simulation.timeline import LANE_NAMES

    action = timeline.action
    columns = {"kind": KIND, "stage": STAGE, "microbatch": MICROBATCH, "slice": SLICE, "replica": REPLICA}
    memory = [
        (levels + (peak - levels.max(initial=0.0))).round().tolist()
        for levels, peak in zip(timeline.memory_bytes, peak_bytes, strict=False)
    ]
    return {
        "source": timeline.source,
        "num_ranks": timeline.num_ranks,
        "makespan_s": timeline.makespan_s,
        "lanes": list(LANE_NAMES),
        "kinds": [kind.name for kind in Kind],
        "rank": timeline.rank.tolist(),
        "lane": timeline.lane.tolist(),
        **{name: action[:, column].tolist() for name, column in columns.items()},
        "start_s": timeline.start_s.round(9).tolist(),
        "end_s": timeline.end_s.round(9).tolist(),
        "memory_time_s": [times.round(9).tolist() for times in timeline.memory_time_s],
        "memory_bytes": memory,
        "critical_path": timeline.critical_path.tolist(),
    }
