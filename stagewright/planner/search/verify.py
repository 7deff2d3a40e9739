"""Checks a plan's certificate without the search that made it.

What is checked: the plan scored again gives the objective; its ranks fit their devices; the gap follows from objective
and bound; the bound is not above the objective; no stored number contradicts the words optimal and within_gap; and the
bound is proved again for the candidates of the declared space where arithmetic is enough (`reproof`). What rests on the
word of linear programs, and how many candidates that are, is returned, not hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

from stagewright.planner.documents.plan import Certificate, Plan, Prediction
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.prediction import evaluate
from stagewright.planner.search.pool_reproof import PoolReproof
from stagewright.planner.search.pools import group_pools
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.reproof import Reproof, rank_rooms, reprove_equal_degrees
from stagewright.planner.search.stage_answer import alone_on, pools_of
from stagewright.planner.search.stage_graph import has_branches
from stagewright.planner.search.targets import target_jobs

_TOLERANCE = 1e-6


def verify_certificate(plan: Plan, profile: ModelProfile) -> Reproof | None:
    """Return what of the bound was proved again, None where the space is of a kind that is not enumerated here.

    Raises InvalidDocument, with both numbers, unless the plan keeps what its certificate says of it.
    """
    certificate = plan.certificate
    if certificate is None:
        raise InvalidDocument("the plan has no certificate", field="certificate", hint="plan with the exact planner")
    prediction = evaluate(plan, profile).prediction
    found = objective_of(plan, prediction, certificate.objective_name)
    if abs(found - certificate.objective) > _TOLERANCE * certificate.objective:
        raise InvalidDocument(
            f"the certificate's {certificate.objective_name} is {certificate.objective!r}, the plan has {found!r}",
            field="certificate.objective",
        )
    least, most = certificate.bound, certificate.objective
    if certificate.objective_name == "tokens_per_dollar":
        least, most = most, least
    if least > most * (1 + _TOLERANCE):
        raise InvalidDocument(
            f"the bound {certificate.bound!r} and the objective {certificate.objective!r} of "
            f"{certificate.objective_name} are the wrong way round",
            field="certificate.bound",
        )
    gap = most / least - 1.0 if least > 0 else float("inf")
    if certificate.objective_name != "frontier" and abs(max(gap, 0.0) - certificate.gap) > _TOLERANCE:
        raise InvalidDocument(
            f"objective and bound make a gap of {gap!r}, the certificate says {certificate.gap!r}",
            field="certificate.gap",
        )
    if certificate.status == "optimal" and certificate.gap > _TOLERANCE:
        raise InvalidDocument(
            f"the certificate says optimal with a gap of {certificate.gap!r}, it may be {_TOLERANCE}",
            field="certificate.status",
        )
    for rank, (needed, room) in enumerate(zip(prediction.peak_memory_bytes, rank_rooms(plan), strict=True)):
        if needed > room * (1 + _TOLERANCE):
            raise InvalidDocument(
                f"pipeline rank {rank} needs {needed:.0f} bytes, the device leaves {room:.0f}",
                field=f"prediction.peak_memory_bytes[{rank}]",
            )
    return reprove(plan, profile, certificate)


def reprove(plan: Plan, profile: ModelProfile, certificate: Certificate) -> Reproof | None:
    """Return what holds by arithmetic of a certificate's bound, part by part of its space; None for a kind without a check.

    Raises InvalidDocument where the space is not the one that was counted, or where a plan is below the bound.
    """
    if plan.planner != "exact" or "most_bytes" in certificate.space:
        return None
    counts = certificate.space.get("devices")
    if not isinstance(counts, list) or not counts:
        raise InvalidDocument("the certificate's space names no devices", field="certificate.space.devices")
    numbers = tuple(int(count) for count in counts)
    problem = Problem(profile, plan.cluster, plan.job, max(numbers), numbers)
    if certificate.objective_name != "step_time_s":
        parts = list(_by_count(problem, plan, certificate, numbers))
        return sum(parts, start=Reproof()) if parts else None
    found = _least_step(problem, certificate.bound)
    is_whole = not certificate.pruned.get("not priced") and certificate.status != "feasible"
    if is_whole and found.candidates != certificate.candidates:
        raise InvalidDocument(
            f"the certificate counts {certificate.candidates} candidates, the declared space has {found.candidates}",
            field="certificate.candidates",
            hint="plan again with this version",
        )
    return found


def _least_step(problem: Problem, bound_s: float) -> Reproof:
    """Return what holds of a bound of the step over all parts of a job's space, which are those that `exact` searches."""
    space, is_mixed = problem.job.space, problem.cluster.is_mixed
    equal: list[Problem] = []
    if not space.ties:
        equal = [alone_on(problem, pool) for pool in group_pools(problem.cluster)] if is_mixed else [problem]
    found = sum((_equal_degrees(part, bound_s) for part in equal), start=Reproof())
    if space.ties or is_mixed or space.per_stage_degrees or has_branches(problem.profile):
        found += PoolReproof(pools_of(problem), bound_s).run()
    return found


def _equal_degrees(problem: Problem, bound_s: float) -> Reproof:
    jobs = target_jobs(problem.job) or [problem.job]
    parts = [Problem(problem.profile, problem.cluster, job, problem.num_devices, problem.only_counts) for job in jobs]
    return sum((reprove_equal_degrees(part, bound_s) for part in parts), start=Reproof())


def _by_count(problem: Problem, plan: Plan, certificate: Certificate, counts: tuple[int, ...]) -> Iterator[Reproof]:
    """Yield what holds of the least step on the numbers of devices that a bound of another objective speaks of."""
    most_s = plan.job.step_deadline_s or float("inf")
    if certificate.objective_name == "peak_memory_bytes":
        yield reprove_equal_degrees(problem.narrowed(most_bytes=certificate.bound * (1 - _TOLERANCE)), most_s)
    elif certificate.objective_name == "num_devices":
        for count in counts:
            if count < certificate.bound:
                yield reprove_equal_degrees(problem.narrowed(counts=(count,)), most_s)
    elif certificate.objective_name == "tokens_per_dollar":
        # tokens / dollar <= bound on n devices: n step >= n step of the plan x its tokens / dollar over the bound.
        least = plan.num_devices * plan.prediction.step_time_s * certificate.objective / certificate.bound
        for count in counts:
            yield reprove_equal_degrees(problem.narrowed(counts=(count,)), least / count)


def objective_of(plan: Plan, prediction: Prediction, name: str) -> float:
    """Return a plan's value of an objective by its name in certificates; raises InvalidDocument for another name."""
    values = {
        "step_time_s": prediction.step_time_s,
        "frontier": prediction.step_time_s,
        "peak_memory_bytes": max(prediction.peak_memory_bytes),
        "num_devices": float(plan.num_devices),
        "tokens_per_dollar": prediction.tokens_per_dollar,
    }
    value = values.get(name)
    if value is None:
        raise InvalidDocument(f"the plan has no {name}", field="certificate.objective_name")
    return value
