"""`stagewright rent`: how many nodes of each zone to rent, for most tokens a dollar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, console, print_document, progress_bar, seconds_text
from stagewright.planner.errors import InvalidArgument

if TYPE_CHECKING:
    from stagewright.planner.documents import Cluster


def rent(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Profile or config.json by path, or a catalogue name.")],
    zones: Annotated[str, typer.Option(help="A cluster whose groups are zones and whose nodes are their quotas.")],
    price: Annotated[
        list[str] | None, typer.Option(help="ZONE=DOLLARS an hour and device, in place of the zone's own; may repeat.")
    ] = None,
    global_batch: Annotated[int, typer.Option(help="Samples of one optimizer step.")] = 256,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a sample; the model's own unless told.")
    ] = None,
    most_step: Annotated[float | None, typer.Option(help="Seconds a step may take.")] = None,
    most_dollars: Annotated[float | None, typer.Option(help="Dollars an hour that the devices may cost.")] = None,
    gap: Annotated[float, typer.Option(help="Gap to prove for each choice of nodes.")] = 0.01,
    deadline: Annotated[float | None, typer.Option(help="Seconds for all choices together.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here.")] = None,
    json: Json = False,
) -> None:
    """Choose how many nodes of each zone to rent under quotas, for most tokens a dollar (Sailor's question).

    Example: stagewright rent gpt2 --zones a100-sxm-80g:8x1+v100-sxm-32g:8x1 --price a100-sxm-80g=2.0 --price v100-sxm-32g=0.5
    """
    from stagewright.cli.inputs import load_cluster, load_model
    from stagewright.cli.plan import profile_sequence
    from stagewright.planner.documents import TrainingJob
    from stagewright.planner.plan_summary import plan_summary
    from stagewright.planner.quotas import dollars_per_hour
    from stagewright.planner.quotas import rent as best_rental

    with progress_bar(quiet=json) as report:
        profile = load_model(model)
        machines = _priced(load_cluster(zones, report), price or [])
        job = TrainingJob(global_batch=global_batch, sequence_length=profile_sequence(profile, sequence_length))
        found = best_rental(
            profile,
            machines,
            job,
            most_step_s=float("inf") if most_step is None else most_step,
            most_dollars_per_hour=float("inf") if most_dollars is None else most_dollars,
            gap=gap,
            deadline_s=deadline,
        )
    if output is not None:
        found.plan.save(output)
    step_s, hourly = found.plan.prediction.step_time_s, dollars_per_hour(found.plan)
    if json:
        print_document(
            {
                "nodes": dict(found.nodes),
                "tokens_per_dollar": found.tokens_per_dollar,
                "step_time_s": step_s,
                "dollars_per_hour": hourly,
                "choices": found.choices,
                "searched": found.searched,
                "plan": found.plan.model_dump(mode="json"),
            }
        )
        return
    nodes = " + ".join(f"{count} of {name}" for name, count in found.nodes.items())
    console().print(
        f"rent {nodes}: {plan_summary(found.plan)}, step {seconds_text(step_s)}, {hourly:.2f} dollars an hour, "
        f"{found.tokens_per_dollar:,.0f} tokens a dollar; {found.searched} of {found.choices} choices of nodes searched"
    )


def _priced(zones: Cluster, prices: list[str]) -> Cluster:
    """Return the zones with the prices that were told; raises InvalidArgument for another form or an unknown zone."""
    told: dict[str, float] = {}
    names = [group.name for group in zones.groups]
    for text in prices:
        name, _, value = text.partition("=")
        # A zone goes by its group's name, or by its device's where one group has it.
        matching = [group.name for group in zones.groups if name in (group.name, group.device.name)]
        if len(matching) != 1:
            raise InvalidArgument(
                f"--price {text!r} names no zone",
                field="price",
                hint="ZONE=DOLLARS, with a zone of " + ", ".join(names),
            )
        try:
            told[matching[0]] = float(value)
        except ValueError as error:
            raise InvalidArgument(f"--price {text!r} has no number", field="price", hint="e.g. fast=2.0") from error
        if not 0 < told[matching[0]] < float("inf"):
            raise InvalidArgument(f"--price {text!r}: a price is above 0", field="price")
    groups = tuple(
        group.model_copy(update={"device": group.device.model_copy(update={"price_per_hour": told[group.name]})})
        if group.name in told
        else group
        for group in zones.groups
    )
    return zones.model_copy(update={"groups": groups})
