"""What is wrong with a request or a plan, as a list: an answer for forms and for CI, never an exception.

Requests are read in the server, so that a form is answered while a simulation runs; plans are simulated, in the desk's
process, which is why the simulator is imported only there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from stagewright.api.names import check_fit, cluster_of, profile_of
from stagewright.api.problems import Problem, pointer_of, problem_of
from stagewright.api.requests import plan_request, read_cluster, read_model
from stagewright.api.resources import ValidationReport, Violation
from stagewright.planner.documents import Cluster, ModelProfile, Plan
from stagewright.planner.errors import StagewrightError

S = TypeVar("S")
T = TypeVar("T")


def request_report(value: object, *, max_devices: int) -> ValidationReport:
    """Return what is wrong with the planning request that parsed JSON holds; quick, and without the solver."""
    if not isinstance(value, Mapping):
        return _failed(Problem("invalid-document", f"request is a {type(value).__name__}, an object is wanted"))
    try:
        request = plan_request(value, prefix="/request")
    except Problem as problem:
        return _failed(problem)
    found: list[Violation] = []
    profile = _resolved(profile_of, request.model, "/request/model", found)
    cluster = _resolved(cluster_of, request.cluster, "/request/cluster", found)
    if profile is not None and cluster is not None:
        try:
            check_fit(request, profile, cluster, max_devices=max_devices)
        except StagewrightError as error:
            found.append(_violation(error, f"/request{pointer_of(error.field or '')}"))
    return ValidationReport(valid=not found, violations=found, summary=_summary(profile, cluster))


def plan_report(value: Mapping[str, object]) -> ValidationReport:
    """Return what is wrong with the plan that a ValidationRequest holds."""
    try:
        return _plan_report(value)
    except Problem as problem:
        return _failed(problem)
    except StagewrightError as error:
        return _failed(problem_of(error))


def _violations_of(plan: Plan, profile: ModelProfile) -> list[Violation]:
    from stagewright.planner.plan_check import plan_violations

    return [
        Violation(code=row.code, message=row.message, pointer=f"/plan{pointer_of(row.field)}", hint=row.hint)
        for row in plan_violations(plan, profile)
    ]


def _plan_report(value: Mapping[str, object]) -> ValidationReport:
    plan = _plan(value["plan"])
    found: list[Violation] = []
    if value.get("cluster") is not None:
        cluster = _resolved(cluster_of, read_cluster(value["cluster"], prefix="/cluster"), "/cluster", found)
        plan = plan if cluster is None else plan.model_copy(update={"cluster": cluster})
    if value.get("model") is None:
        message = "give the plan's model: without it, neither its layers nor its memory can be checked"
        found.append(Violation(code="model-missing", message=message, pointer="/model"))
        return ValidationReport(valid=False, violations=found)
    profile = _resolved(profile_of, read_model(value["model"], prefix="/model"), "/model", found)
    if profile is not None:
        found += _violations_of(plan, profile)
    return ValidationReport(valid=not found, violations=found)


def _plan(value: object) -> Plan:
    try:
        return Plan.from_object(value)
    except StagewrightError as error:
        raise problem_of(error, prefix="/plan") from error


def _resolved(resolve: Callable[[S], T], value: S, pointer: str, found: list[Violation]) -> T | None:
    try:
        return resolve(value)
    except StagewrightError as error:
        found.append(_violation(error, pointer))
        return None


def _violation(error: StagewrightError, pointer: str) -> Violation:
    return Violation(code=error.kind, message=error.message, pointer=pointer, hint=error.hint)


def _failed(problem: Problem) -> ValidationReport:
    listed = [
        Violation(code=problem.kind, message=error["detail"], pointer=error.get("pointer"), hint=problem.hint)
        for error in problem.errors
    ]
    whole = Violation(code=problem.kind, message=problem.detail, hint=problem.hint)
    return ValidationReport(valid=False, violations=listed or [whole])


def _summary(profile: ModelProfile | None, cluster: Cluster | None) -> dict[str, object]:
    summary: dict[str, object] = {}
    if profile is not None:
        summary |= {
            "model": profile.name,
            "num_layers": profile.num_layers,
            "num_parameters": profile.num_parameters,
        }
    if cluster is not None:
        summary |= {"cluster": cluster.name, "num_devices": cluster.num_devices, "groups": _groups(cluster)}
    return summary


def _groups(cluster: Cluster) -> list[dict[str, object]]:
    return [
        {
            "device": group.device.name,
            "num_nodes": group.num_nodes,
            "devices_per_node": group.devices_per_node,
            "memory_bytes": group.device.memory_bytes,
        }
        for group in cluster.groups
    ]
