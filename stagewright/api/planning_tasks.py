"""The tasks of the solver processes: solve, simulate, validate, from JSON to JSON by way of the planner.

The planner's compiled parts are imported inside the functions: the server names these functions and never runs them.
"""

from __future__ import annotations

import json

from stagewright.api.names import cluster_of, profile_of
from stagewright.api.requests import SimulationRequest
from stagewright.api.tasks import TaskContext
from stagewright.planner.documents.document import canonical_json
from stagewright.planner.documents.request import PlanRequest

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
    from stagewright.api.timeline_columns import columns_of
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
        report["timeline"] = columns_of(evaluation.timeline, evaluation.prediction.peak_memory_bytes)
    return canonical_json(report)


def validate(argument: str, _context: TaskContext) -> str:
    """Return the ValidationReport of a ValidationRequest that holds a plan, both as JSON."""
    from stagewright.api.validation import plan_report

    return canonical_json(plan_report(json.loads(argument)).model_dump(mode="json"))
