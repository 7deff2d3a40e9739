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
        if degrees.etp > 1:
            raise InvalidArgument(
                f"etp is {degrees.etp}, the runtime divides experts and not the tensors of one",
                field=f"{field}.degrees.etp",
                hint="pin etp=1",
            )
        owners = degrees.num_devices // degrees.ep
        if degrees.ep > 1 and degrees.zero > 1 and owners > 1:
            raise InvalidArgument(
                f"zero is {degrees.zero} with ep {degrees.ep} on {degrees.num_devices} devices; experts that {owners} "
                "devices own are sharded at ZeRO stage 1 only",
                field=f"{field}.degrees.zero",
                hint="pin zero=1, or an ep that covers all devices of the stage",
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
