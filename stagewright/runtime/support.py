"""Which plans the runtime executes. Anything else is refused before a rank starts, never run as something similar."""

from __future__ import annotations

from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument

PRECISIONS = ("fp64", "fp32", "bf16", "fp16")


def check_supported(plan: Plan) -> None:
    """Raise InvalidArgument naming the field of the plan that the runtime does not execute."""
    first = plan.stages[0].degrees
    for index, stage in enumerate(plan.stages):
        field = f"stages[{index}]"
        degrees = stage.degrees
        if degrees != first:
            raise InvalidArgument(
                f"{field} has degrees {degrees.model_dump()}, stages[0] {first.model_dump()}; the runtime takes equal ones",
                field=f"{field}.degrees",
                hint="plan with equal degrees for all stages",
            )
        if degrees.etp > 1 or (degrees.ep > 1 and (degrees.tp > 1 or degrees.zero or degrees.dp % degrees.ep)):
            raise InvalidArgument(
                f"ep is {degrees.ep} and etp {degrees.etp} with dp {degrees.dp}, tp {degrees.tp}, zero {degrees.zero}; "
                "the runtime divides experts over data-parallel replicas only",
                field=f"{field}.degrees.ep",
                hint="pin etp=1, tp=1 and zero=0, and an ep that divides dp",
            )
        if stage.batch_shares:
            raise InvalidArgument(
                f"batch_shares is {list(stage.batch_shares)}, the runtime gives replicas equal shares",
                field=f"{field}.batch_shares",
            )
    if first.cp > 1 and plan.schedule.num_slices > 1:
        raise InvalidArgument(
            f"cp is {first.cp} and num_slices {plan.schedule.num_slices}, a sequence is divided one way only",
            field="schedule.num_slices",
        )
    if plan.job.precision not in PRECISIONS:
        raise InvalidArgument(
            f"the runtime does not train in {plan.job.precision}", field="job.precision", hint=", ".join(PRECISIONS)
        )
