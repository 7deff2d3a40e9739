"""Why a plan takes as long as it does: its step in parts, the constraint that binds, and what came behind.

The busiest pipeline rank works, reduces and steps, or is idle; its idle seconds are communication as far as the
simulated critical path is in messages, and bubble for the rest. Whatever the job's objective, the step is explained. Memory binds where the same question on devices with
room for everything has a plan below the proved bound; otherwise the largest part of the step binds. Nothing is guessed:
each claim is a simulation or a search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.explanation import (
    Binding,
    Comparison,
    Explanation,
    PathShares,
    RankLoad,
    RunnerUp,
    WhyNot,
)
from stagewright.planner.documents.job import Pins, TrainingJob
from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.plan_check import memory_limits
from stagewright.planner.plan_summary import plan_summary
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import Evaluation, evaluate
from stagewright.planner.relaxations import without_memory_limit
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND
from stagewright.planner.simulation.timeline import COMPUTE_LANE

GIB = 2.0**30

Report = Callable[[str, int, int], None]

_WORDS = {
    "compute": "the work of pipeline rank {rank} is {share:.1%} of the step",
    "bubble": "filling and draining the pipeline is {share:.1%} of the step",
    "communication": "messages between pipeline ranks are {share:.1%} of the step",
    "reduction": "gradient reduction and optimizer are {share:.1%} of the step",
    "overhead": "the constant overhead of a step is {share:.1%} of it",
}


@dataclass(frozen=True)
class Searches:
    """How far the searches behind an explanation go.

    Parameters
    ----------
    runners_up : plans to name behind the best; without any, nothing is searched but what was asked.
    gap, deadline_s : of each search; the job's own when None.
    """

    runners_up: int = 3
    gap: float | None = None
    deadline_s: float | None = None


def explain(
    plan: Plan,
    profile: ModelProfile,
    *,
    why_not: Pins | None = None,
    searches: Searches | None = None,
    report: Report = lambda phase, done, total: None,
) -> Explanation:
    """Return why `plan` is what it is; raises InvalidDocument when it was made for other layers."""
    searches = searches or Searches()
    evaluation = evaluate(plan, profile)
    step_s = evaluation.prediction.step_time_s
    total = (2 if searches.runners_up else 0) + (why_not is not None)
    report("explaining", 0, total)
    others: tuple[RunnerUp, ...] = ()
    unlimited: PlanOutcome | None = None
    if searches.runners_up:
        again = _search(profile, plan.cluster, plan.job, plan, searches, searches.runners_up + 1)
        others = _runners_up(plan, step_s, again, searches.runners_up)
        report("explaining", 1, total)
        unlimited = _search(profile, without_memory_limit(plan.cluster), plan.job, plan, searches, 0)
        report("explaining", 2, total)
    answer = None
    if why_not is not None:
        answer = _why_not(plan, evaluation, profile, why_not, searches)
    report("explaining", total, total)
    certificate = plan.certificate if _proves_step(plan) else None
    return Explanation(
        model=plan.model,
        cluster=plan.cluster.name,
        summary=plan_summary(plan),
        step_time_s=step_s,
        bound_s=None if certificate is None else certificate.bound,
        gap=None if certificate is None else certificate.gap,
        shares=path_shares(evaluation, profile)[0],
        ranks=_ranks(plan, evaluation, profile),
        binding=_binding(plan, evaluation, profile, unlimited),
        runners_up=others,
        why_not=answer,
    )


def path_shares(evaluation: Evaluation, profile: ModelProfile) -> tuple[PathShares, Sequence[float]]:
    """Return the parts of a plan's step, and the compute seconds of its critical path on each rank, [D]."""
    timeline = evaluation.timeline
    path = timeline.critical_path
    seconds = timeline.end_s[path] - timeline.start_s[path]
    tail = timeline.action[:, KIND] == int(Kind.OPT)
    work = (timeline.lane[path] == COMPUTE_LANE) & ~tail[path]
    by_rank = np.bincount(timeline.rank[path[work]], weights=seconds[work], minlength=timeline.num_ranks)
    sent = timeline.makespan_s - float(seconds[timeline.lane[path] == COMPUTE_LANE].sum())
    busy = timeline.busy_s()
    rank = int(np.argmax(busy))
    tails = np.flatnonzero(tail & (timeline.rank == rank))
    reduction = float((timeline.end_s[tails] - timeline.start_s[tails]).sum())
    idle = max(0.0, timeline.makespan_s - float(busy[rank]))
    communication = min(idle, max(0.0, sent))
    shares = PathShares(
        compute_s=float(busy[rank]) - reduction,
        bubble_s=idle - communication,
        communication_s=communication,
        reduction_s=reduction,
        overhead_s=profile.step_overhead_s,
    )
    return shares, by_rank.tolist()


def _proves_step(plan: Plan) -> bool:
    """Tell whether a plan's certificate speaks of its step, and not of memory, devices or dollars."""
    return plan.certificate is not None and plan.certificate.objective_name == "step_time_s"


def num_devices_asked(plan: Plan) -> int:
    """Return how many devices the question of a plan allowed."""
    counts = plan.certificate.space.get("devices") if plan.certificate is not None else None
    if isinstance(counts, list) and counts:
        return max(int(count) for count in counts)
    return plan.cluster.num_devices


def _search(
    profile: ModelProfile, cluster: Cluster, job: TrainingJob, plan: Plan, searches: Searches, top: int
) -> PlanOutcome:
    return make_plan(
        profile,
        cluster,
        job.model_copy(update={"objective": "step-time"}),
        num_devices=num_devices_asked(plan),
        top=top,
        gap=searches.gap,
        deadline_s=searches.deadline_s,
    )


def _runners_up(plan: Plan, step_s: float, outcome: PlanOutcome, most: int) -> tuple[RunnerUp, ...]:
    """Return the best plans of the search that are not the plan itself, the fastest first."""
    found = [] if outcome.plan is None else [outcome.plan]
    found += [other.plan for other in outcome.alternatives]
    others = [other for other in found if _choice(other) != _choice(plan)]
    others.sort(key=lambda other: other.prediction.step_time_s)
    return tuple(
        RunnerUp(
            summary=plan_summary(other),
            step_time_s=other.prediction.step_time_s,
            slower=other.prediction.step_time_s / step_s - 1.0,
            peak_memory_bytes=max(other.prediction.peak_memory_bytes),
        )
        for other in others[:most]
    )


def _choice(plan: Plan) -> object:
    return plan.stages, plan.schedule, plan.mapping


def _ranks(plan: Plan, evaluation: Evaluation, profile: ModelProfile) -> tuple[RankLoad, ...]:
    prediction = evaluation.prediction
    on_path = path_shares(evaluation, profile)[1]
    room = 1.0 - plan.job.space.memory_headroom
    return tuple(
        RankLoad(
            pipeline_rank=rank,
            path_s=on_path[rank],
            busy_s=float(busy),
            peak_bytes=peak,
            available_bytes=memory_bytes * room,
            largest_item=max(items.model_dump().items(), key=lambda item: item[1])[0],
            items=items,
        )
        for rank, (busy, peak, memory_bytes, items) in enumerate(
            zip(
                evaluation.timeline.busy_s(),
                prediction.peak_memory_bytes,
                memory_limits(plan),
                prediction.memory,
                strict=True,
            )
        )
    )


def _binding(
    plan: Plan, evaluation: Evaluation, profile: ModelProfile, unlimited: PlanOutcome | None = None
) -> Binding:
    step_s = evaluation.prediction.step_time_s
    proved_s = plan.certificate.bound if plan.certificate is not None and _proves_step(plan) else step_s
    free_s = None if unlimited is None or unlimited.plan is None else unlimited.plan.prediction.step_time_s
    ranks = _ranks(plan, evaluation, profile)
    if free_s is not None and unlimited is not None and unlimited.plan is not None and free_s < proved_s * (1 - 1e-9):
        fullest = max(ranks, key=lambda item: item.peak_bytes / item.available_bytes)
        return Binding(
            kind="memory",
            pipeline_rank=fullest.pipeline_rank,
            message=(
                f"memory: pipeline rank {fullest.pipeline_rank} holds {fullest.peak_bytes / GIB:.2f} of "
                f"{fullest.available_bytes / GIB:.2f} GiB, mostly {fullest.largest_item}; without the limit "
                f"{plan_summary(unlimited.plan)} would take {free_s:.4g} s instead of {step_s:.4g} s and "
                f"{max(unlimited.plan.prediction.peak_memory_bytes) / GIB:.2f} GiB"
            ),
            step_time_s=free_s,
        )
    shares = path_shares(evaluation, profile)[0]
    parts = {name.removesuffix("_s"): value for name, value in shares.model_dump().items()}
    kind = max(parts, key=lambda name: parts[name])
    rank = int(np.argmax(evaluation.timeline.busy_s())) if kind == "compute" else None
    return Binding.model_validate(
        {
            "kind": kind,
            "pipeline_rank": rank,
            "message": _WORDS[kind].format(rank=rank, share=parts[kind] / step_s)
            + ("" if free_s is None else "; memory does not bind"),
        }
    )


def _why_not(plan: Plan, evaluation: Evaluation, profile: ModelProfile, pins: Pins, searches: Searches) -> WhyNot:
    asked = {name: value for name, value in pins if value is not None}
    job = with_pins(plan.job, pins)
    outcome = _search(profile, plan.cluster, job, plan, searches, 0)
    texts = tuple(f"{name}={value}" for name, value in asked.items())
    if outcome.plan is None:
        return WhyNot(pins=texts, status=outcome.status, bound_s=outcome.bound_s, diagnosis=outcome.diagnosis)
    other = evaluate(outcome.plan, profile)
    return WhyNot(
        pins=texts,
        status=outcome.status,
        plan=outcome.plan,
        step_time_s=other.prediction.step_time_s,
        bound_s=outcome.bound_s,
        slower=other.prediction.step_time_s / evaluation.prediction.step_time_s - 1.0,
        binding=_binding(outcome.plan, other, profile),
        shares=path_shares(other, profile)[0],
        comparison=_compare(plan, evaluation, outcome.plan, other, profile),
    )


def with_pins(job: TrainingJob, pins: Pins) -> TrainingJob:
    """Return the job with more pins; a pin that is there already gives way."""
    merged = job.space.pins.model_copy(update={name: value for name, value in pins if value is not None})
    return job.model_copy(update={"space": job.space.model_copy(update={"pins": merged})})


def _compare(
    plan: Plan, first: Evaluation, other_plan: Plan, second: Evaluation, profile: ModelProfile
) -> tuple[Comparison, ...]:
    def numbers(document: Plan, evaluation: Evaluation) -> dict[str, str | float | None]:
        prediction = evaluation.prediction
        shares = path_shares(evaluation, profile)[0]
        return {
            "choice": plan_summary(document),
            "step_time_s": prediction.step_time_s,
            **{f"step.{name}": value for name, value in shares.model_dump().items()},
            "bubble_over_total": prediction.bubble_over_total,
            "peak_memory_bytes": max(prediction.peak_memory_bytes),
            "mfu": prediction.mfu,
            "num_microbatches": float(document.schedule.num_microbatches),
            "recomputed_layers": float(
                sum(level != "none" for stage in document.stages for level in stage.recompute_levels())
            ),
            "sent_bytes": float(sum(prediction.link_bytes.values())),
        }

    left, right = numbers(plan, first), numbers(other_plan, second)
    return tuple(Comparison(name=name, plan=left[name], other=right[name]) for name in left)
