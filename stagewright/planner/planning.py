"""One call from a question to an answer: profile, cluster and job in, plan with certificate out.

`make_plan` validates what contradicts itself, runs the named planner, scores what it found with the common simulator
and turns limits into a status: optimal, within_gap, feasible, infeasible or no_solution.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from stagewright.planner.diagnosis import diagnose
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.outcome import PlanOutcome, Progress
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.executors.executor import NAMES as EXECUTORS
from stagewright.planner.executors.executor import executor as named_executor
from stagewright.planner.executors.mapped_search import solve_mapped
from stagewright.planner.objectives.step_time import below_deadline
from stagewright.planner.planners.registry import planner as named_planner
from stagewright.planner.replanning import replan
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import check_pins
from stagewright.planner.search.stage_answer import largest_group

Report = Callable[[Progress], None]


def make_plan(
    profile: ModelProfile,
    cluster: Cluster,
    job: TrainingJob,
    *,
    planner: str = "exact",
    num_devices: int | None = None,
    top: int = 5,
    gap: float | None = None,
    deadline_s: float | None = None,
    executor: str = "inline",
    previous: Plan | None = None,
    progress: Report | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> PlanOutcome:
    """Return the best plan the named planner finds, with what it proved.

    Parameters
    ----------
    num_devices : use at most this many; all of the cluster when None.
    top : alternatives to return beside the plan.
    gap, deadline_s : override the job's.
    executor : "inline", "process" or "ray": where the parts of the search run (`executors`).
    previous : a plan that runs and that this one follows: the same global batch, little state moved (`replanning`).
    progress : called with the phase, the incumbent and the bound.
    should_stop : asked between steps; true ends the search with the best so far.

    Raises
    ------
    InvalidArgument : for an unknown planner, more devices than the cluster has, or pins that contradict each other.
    """
    started = time.perf_counter()
    devices = cluster.num_devices if num_devices is None else num_devices
    if not 1 <= devices <= cluster.num_devices:
        raise InvalidArgument(
            f"{devices} devices were asked for, cluster {cluster.name} has {cluster.num_devices}",
            field="devices",
            hint=f"give a number from 1 to {cluster.num_devices}",
        )
    _refuse_unsearched(cluster, job, planner, executor, previous)
    row = named_planner(planner)
    problem = Problem(profile, cluster, job, devices)
    check_pins(profile, job, devices)
    limits = Limits(
        gap=job.gap if gap is None else gap,
        deadline_s=job.deadline_s if deadline_s is None else deadline_s,
        started_s=started,
        top=top,
        executor=executor,
        previous=previous,
        progress=progress,
        should_stop=should_stop,
    )
    if executor != "inline":
        outcome = below_deadline(problem, solve_mapped(problem, limits, named_executor(executor)))
    elif previous is not None:
        outcome = replan(problem, limits, previous)
    else:
        outcome = row.solve(problem, limits)
    if outcome.status == "infeasible" and outcome.diagnosis is None:
        outcome = outcome.model_copy(update={"diagnosis": diagnose(largest_group(problem), limits)})
    return outcome.model_copy(update={"wall_s": time.perf_counter() - started})


def _refuse_unsearched(cluster: Cluster, job: TrainingJob, planner: str, executor: str, previous: Plan | None) -> None:
    """Raise InvalidArgument for what no planner here searches yet, rather than answer another question."""
    space = job.space
    if cluster.is_mixed and planner != "exact":
        raise InvalidArgument(
            f"cluster {cluster.name} has {len(cluster.groups)} groups, planner {planner} knows one kind of device",
            field="cluster",
            hint="take the exact planner, or plan each group alone",
        )
    if planner != "exact" and (job.objective != "step-time" or job.step_deadline_s is not None):
        raise InvalidArgument(
            f"planner {planner} has an objective of its own; {job.objective} and step deadlines are the exact planner's",
            field="objective",
            hint="leave --planner out, or ask for step-time without a deadline",
        )
    elsewhere = planner != "exact" or job.objective != "step-time" or previous is not None
    if executor not in ("inline", *EXECUTORS) or (executor != "inline" and elsewhere):
        raise InvalidArgument(
            f"executor {executor} is for the exact planner's least step, without --from"
            if executor in EXECUTORS
            else f"there is no executor {executor!r}",
            field="executor",
            hint="known: " + ", ".join(EXECUTORS) + "; inline does everything",
        )
    differ = cluster.is_mixed or space.per_stage_degrees or bool(space.ties)
    asked = job.objective != "step-time" or job.step_deadline_s is not None
    if differ and (asked or previous is not None or executor != "inline"):
        raise InvalidArgument(
            "stages that differ (a mixed cluster, per_stage_degrees, tied layers) are searched for step-time without a deadline, "
            f"inline and from nothing, not for {job.objective} with executor {executor}"
            + (" from a previous plan" if previous is not None else ""),
            field="objective",
            hint="ask for step-time, without --from and --executor",
        )
    refused = {
        "ties": space.ties or None if planner != "exact" else None,
        "target": space.target if differ or planner != "exact" else None,
        "equal": space.equal or None if differ or planner != "exact" else None,
        "per_stage_degrees": "on" if space.per_stage_degrees and not named_planner(planner).by_stage else None,
    }
    for field, value in refused.items():
        if value is not None:
            raise InvalidArgument(f"{field} = {value} is not searched yet", field=field, hint="leave it out")
