"""Checks a plan's certificate without the search that made it.

What is checked: the plan scored again gives the objective; its ranks fit their devices; the gap follows from objective
and bound; the bound is not above the objective; no stored number contradicts the words optimal and within_gap; and the
bound is proved again for the candidates of the declared space where arithmetic is enough (`reproof`). What rests on the
word of linear programs, and how many candidates that are, is returned, not hidden.
"""

from __future__ import annotations

from stagewright.planner.documents.plan import Plan, Prediction
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.prediction import evaluate, rank_devices
from stagewright.planner.search.reproof import Reproof, reprove

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
    for rank, (needed, device) in enumerate(zip(prediction.peak_memory_bytes, rank_devices(plan), strict=True)):
        room = device.memory_bytes * (1.0 - plan.job.space.memory_headroom)
        if needed > room * (1 + _TOLERANCE):
            raise InvalidDocument(
                f"pipeline rank {rank} needs {needed:.0f} bytes, the device leaves {room:.0f}",
                field=f"prediction.peak_memory_bytes[{rank}]",
            )
    return reprove(plan, profile)


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
