"""`stagewright validate`: what is wrong with a plan on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, console, print_document, progress_bar

if TYPE_CHECKING:
    from stagewright.planner.documents import ModelProfile, Plan
    from stagewright.planner.plan_check import PlanViolation

INVALID = 2


def validate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan document.")],
    profile: Annotated[
        Path | None, typer.Option(help="Its profile; profile.json beside it or the catalogue's unless told.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="Check against this cluster instead of the plan's own.")] = None,
    target: Annotated[str | None, typer.Option(help="Check that this format can express it without loss.")] = None,
    json: Json = False,
) -> None:
    """Check that a plan fits its model, its batch, a cluster's memory and a format; exit 2 when it does not.

    Example: stagewright validate plan.json --cluster a100-sxm-80g:8x4
    """
    from stagewright.cli.inputs import load_cluster
    from stagewright.cli.simulate import find_profile
    from stagewright.planner.documents import ModelProfile, Plan
    from stagewright.planner.plan_check import plan_violations

    document = Plan.load(plan)
    model = ModelProfile.load(profile) if profile is not None else find_profile(document, plan)
    with progress_bar(quiet=json) as report:
        machines = None if cluster is None else load_cluster(cluster, report)
    violations = plan_violations(document, model, machines)
    if target is not None:
        violations += target_violations(document, model, target)
    if json:
        rows = [{"code": row.code, "field": row.field, "message": row.message, "hint": row.hint} for row in violations]
        print_document({"valid": not violations, "violations": rows})
    else:
        for row in violations:
            console().print(f"{row.code}: {row.message} ({row.field})")
        if not violations:
            console().print("valid")
    if violations:
        raise typer.Exit(INVALID)


def target_violations(plan: Plan, profile: ModelProfile, target: str) -> list[PlanViolation]:
    """Return what a format would write differently, or cannot write at all; raises InvalidArgument for an unknown one."""
    from stagewright.formats.exporters import exporter
    from stagewright.planner.errors import NotExpressible
    from stagewright.planner.plan_check import PlanViolation

    hint = f"plan again with --target {target}"
    try:
        losses = exporter(target)(plan, profile).losses
    except NotExpressible as error:
        return [PlanViolation("target", error.field or "", error.message, error.hint or hint)]
    return [
        PlanViolation(
            "target", loss.field, f"{target}: {loss.status}, {loss.note or 'the file does not hold it'}", hint
        )
        for loss in losses
        if loss.status != "exact"
    ]
