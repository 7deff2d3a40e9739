"""A backend that obeys the labels of a request, so that tests decide what a solve does and when.

`fake` is one of: quick, slow (reports incumbents until it is stopped), deaf (hears no stop), empty (finds nothing),
infeasible, crash (raises), die (kills its own process), die-once.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from stagewright.api.backend import Backend
from stagewright.api.resources import ValidationReport
from stagewright.planner.documents import Plan
from stagewright.planner.documents.document import canonical_json
from stagewright.planner.documents.outcome import PlanOutcome, Progress
from stagewright.planner.documents.request import PlanRequest
from stagewright.planner.errors import InvalidArgument
from stagewright.testing import cluster_factory, profile_factory


def make_plan(request: PlanRequest) -> Plan:
    profile = profile_factory(4)
    return Plan.from_object(
        {
            "model": profile.name,
            "profile_digest": profile.digest,
            "layer_digest": profile.layer_digest,
            "num_layers": 4,
            "cluster": cluster_factory(2).model_dump(mode="json"),
            "job": request.job.model_dump(mode="json"),
            "planner": "fake",
            "stages": [{"layers": [0, 2]}, {"layers": [2, 4]}],
            "mapping": {"pipeline_ranks": [[0], [1]]},
            "schedule": {"name": "1f1b", "num_ranks": 2, "num_microbatches": 4, "microbatch": 1, "placement": [[0, 1]]},
            "prediction": {
                "step_time_s": 0.03,
                "tokens_per_s": 1.0,
                "samples_per_s": 1.0,
                "bubble_over_total": 0.2,
                "peak_memory_bytes": [1e9, 1e9],
                "memory": [{"parameters": 1e9}, {"parameters": 1e9}],
                "source": "mocked",
            },
        }
    )


def outcome(request: PlanRequest, status: str, *, with_plan: bool = True) -> str:
    fields = {
        "status": status,
        "plan": make_plan(request).model_dump(mode="json") if with_plan else None,
        "objective_s": 0.03 if with_plan else None,
        "bound_s": 0.03 if with_plan else None,
        "gap": 0.0 if with_plan else None,
        "candidates": 1,
        "evaluated": 1,
        "simulated": 1,
        "wall_s": 0.01,
        "diagnosis": {"message": "too big", "binding": "memory"} if status == "infeasible" else None,
    }
    return PlanOutcome.from_object(fields).canonical_json()


def solve(argument: str, context: object) -> str:
    request = PlanRequest.from_object(json.loads(argument))
    what = request.labels.get("fake", "quick")
    log = Path(os.environ["FAKE_LOG"])
    with log.open("a") as stream:
        stream.write(f"{request.labels.get('name', '-')} {what} {os.getpid()}\n")
    if what == "die" or (what == "die-once" and log.read_text().count(" die-once ") == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crash":
        raise RuntimeError("a defect, made on purpose")
    if what == "infeasible":
        return outcome(request, "infeasible", with_plan=False)
    if what == "deaf":
        time.sleep(60)
    done = 0
    while what in ("slow", "empty") and not context.should_stop():
        done += 1
        context.report(Progress("search", done, 10_000, None if what == "empty" else 0.04, 0.03))
        time.sleep(0.02)
    if what == "empty":
        return outcome(request, "no_solution", with_plan=False)
    return outcome(request, "feasible" if what == "slow" else "optimal")


def simulate(argument: str, context: object) -> str:
    value = json.loads(argument)
    if value["model"] == "sleepy":
        time.sleep(60)
    if value["model"] == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    columns = {name: [0, 1] for name in ("rank", "lane", "kind", "stage", "microbatch")}
    timeline = {
        **columns,
        "slice": [-1, -1],
        "replica": [0, 0],
        "source": "simulated",
        "num_ranks": 2,
        "makespan_s": 2.0,
        "lanes": ["compute", "send"],
        "kinds": ["F", "B"],
        "start_s": [0.0, 1.0],
        "end_s": [1.0, 2.0],
        "memory_time_s": [[0.0], [0.0]],
        "memory_bytes": [[1.0], [1.0]],
        "critical_path": [],
    }
    return canonical_json(
        {
            "prediction": value["plan"]["prediction"],
            "timeline": timeline if value["timeline"] else None,
            "num_spans": 2,
            "memory_limit_bytes": [2.0, 2.0],
        }
    )


def validate(argument: str, context: object) -> str:
    return canonical_json({"valid": True, "violations": [], "summary": None})


def check(request: PlanRequest) -> None:
    if isinstance(request.model, str) and request.model not in ("gpt2", "sleepy"):
        raise InvalidArgument(f"there is no model {request.model!r}", field="model", hint="did you mean gpt2?")


def review(value: object) -> ValidationReport:
    return ValidationReport(valid=True, violations=[])


FAKES = Backend(
    solve=solve,
    simulate=simulate,
    validate=validate,
    check=check,
    review=review,
    catalog={name: lambda: [{"name": "gpt2"}] for name in ("gpus", "models", "clusters", "schedules")},
    versions={"stagewright": "fake"},
)
