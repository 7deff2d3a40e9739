"""Planning again on other devices, close to a plan that runs: the same global batch, little state moved, a fast step.

The free question is solved to half the gap, and beside it the question with the previous tensor degree, ZeRO stage and
pipeline depth (or one rank less, or half), and with the whole previous choice but the data-parallel degree. Of all plans found whose step is within the gap of the
proved bound, the one that moves (and restores) least is taken; of equal ones the fastest. So the step keeps its
certificate, and a larger gap lets more state stay where it is. Varuna (Athlur et al., EuroSys 2022) keeps the global batch
the same way, by gradient accumulation.
"""

from __future__ import annotations

from dataclasses import replace

from stagewright.planner.documents.job import Pins
from stagewright.planner.documents.migration import Migration
from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.migration import migration
from stagewright.planner.plan_summary import alternative_of
from stagewright.planner.search.exact import solve
from stagewright.planner.search.limits import OPTIMAL_GAP, Limits
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import check_pins

NUM_COMPARED = 12


def replan(problem: Problem, limits: Limits, previous: Plan) -> PlanOutcome:
    """Return the plan that follows `previous` on the problem's devices, with its migration.

    Raises InvalidArgument when the global batch is another one, InvalidDocument when the model is.
    """
    job, before = problem.job, previous.job
    previous.check_profile(layer_digest=problem.profile.layer_digest, num_layers=problem.profile.num_layers)
    if job.global_batch != before.global_batch:
        raise InvalidArgument(
            f"the previous plan has a global batch of {before.global_batch}, this job {job.global_batch}; replanning keeps it",
            field="global_batch",
            hint="leave --global-batch out, or plan without --from",
        )
    wanted = replace(limits, gap=0.5 * limits.gap, top=NUM_COMPARED)
    free = solve(problem, wanted)
    if free.plan is None or free.bound_s is None:
        return free
    plans = [free.plan, *(other.plan for other in free.alternatives)]
    for pins in _near(previous):
        plans += [plan for plan in _pinned(problem, wanted, pins) if not any(_same(plan, known) for known in plans)]
    scored = [(migration(previous, plan, problem.profile), plan) for plan in plans]
    most_s = max(free.bound_s * (1.0 + limits.gap), free.plan.prediction.step_time_s) * (1 + 1e-9)
    fast = [pair for pair in scored if pair[1].prediction.step_time_s <= most_s]
    fast.sort(key=lambda pair: (_absent(pair[0]), pair[1].prediction.step_time_s))
    return _outcome(problem, limits, free, fast[0], [pair[1] for pair in scored if pair[1] is not fast[0][1]])


def _same(plan: Plan, other: Plan) -> bool:
    return plan.stages == other.stages and plan.schedule == other.schedule and plan.mapping == other.mapping


def _absent(moves: Migration) -> float:
    return moves.moved_bytes + moves.restored_bytes


def _near(previous: Plan) -> list[Pins]:
    """Return pins that keep the previous tensor degree and ZeRO stage, at its depth and shallower ones, then its schedule."""
    degrees, spec = previous.stages[0].degrees, previous.schedule
    depths = sorted({spec.num_ranks, max(1, spec.num_ranks - 1), max(1, spec.num_ranks // 2)}, reverse=True)
    shapes = [Pins(tp=degrees.tp, pp=depth, zero=degrees.zero) for depth in depths]
    whole = {"cp": degrees.cp, "ep": degrees.ep, "chunks": spec.num_chunks, "schedule": spec.name}
    return [*shapes, shapes[0].model_copy(update=whole)]


def _pinned(problem: Problem, limits: Limits, pins: Pins) -> list[Plan]:
    """Return the plans found with some pins beside the job's own; none where they contradict each other."""
    own = problem.job.space.pins
    clash = any(value is not None and getattr(own, name) not in (None, value) for name, value in pins)
    if clash or limits.reached() is not None:
        return []
    merged = own.model_copy(update={name: value for name, value in pins if value is not None})
    job = problem.job.model_copy(update={"space": problem.job.space.model_copy(update={"pins": merged})})
    try:
        check_pins(problem.profile, job, problem.num_devices)
        outcome = solve(replace(problem, job=job), limits)
    except InvalidArgument:
        return []
    found = [other.plan for other in outcome.alternatives]
    found = [outcome.plan, *found] if outcome.plan is not None else found
    return [plan.model_copy(update={"job": problem.job}) for plan in found]


def _outcome(
    problem: Problem, limits: Limits, free: PlanOutcome, chosen: tuple[Migration, Plan], others: list[Plan]
) -> PlanOutcome:
    moves, plan = chosen
    assert free.plan is not None and free.plan.certificate is not None and free.bound_s is not None
    step_s = plan.prediction.step_time_s
    bound_s = min(free.bound_s, step_s)
    gap = max(0.0, step_s / bound_s - 1.0)
    status = "optimal" if gap <= OPTIMAL_GAP else "within_gap" if gap <= limits.gap + 1e-9 else "feasible"
    certificate = free.plan.certificate.model_copy(
        update={"status": status, "objective": step_s, "bound": bound_s, "gap": gap}
    )
    others.sort(key=lambda other: other.prediction.step_time_s)
    return free.model_copy(
        update={
            "status": status,
            "plan": plan.model_copy(update={"certificate": certificate}),
            "objective_s": step_s,
            "bound_s": bound_s,
            "objective": step_s,
            "bound": bound_s,
            "gap": gap,
            "alternatives": tuple(alternative_of(other) for other in others[: limits.top]),
            "migration": moves,
        }
    )
