"""`stagewright phases`: a plan for each phase of a job that trains and runs one model in turn, chosen together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field, ValidationError

from stagewright.cli.output import Json, console, print_document, progress_bar, seconds_text
from stagewright.planner.documents.document import Count, Name, Part, invalid_document, read_json
from stagewright.planner.documents.job import TrainingJob


class PhaseSpec(Part):
    """One phase: the model as this phase costs it, its job, and how often it runs in a round."""

    name: Name
    model: Name
    job: TrainingJob
    repeats: Count = 1


class Round(Part):
    """The phases of a round, in order."""

    phases: Annotated[tuple[PhaseSpec, ...], Field(min_length=1)]


def phases(
    file: Annotated[Path, typer.Argument(metavar="PHASES", help='{"phases": [{"name", "model", "job", "repeats"}]}')],
    cluster: Annotated[str, typer.Option(help="File, catalogue name, DEVICE:PER_NODExNODES, or `local`.")],
    top: Annotated[int, typer.Option(min=0, help="Runners-up of each phase to choose from.")] = 8,
    gap: Annotated[float, typer.Option(help="Gap to prove for each phase.")] = 0.01,
    json: Json = False,
) -> None:
    """Plan the phases of a round together, the change of layout between them included (reinforcement learning).

    Example: stagewright phases round.json --cluster a100-sxm-80g:8x1
    """
    from stagewright.cli.inputs import load_cluster, load_model
    from stagewright.planner.plan_summary import plan_summary
    from stagewright.planner.post_training import Phase, plan_round

    with progress_bar(quiet=json) as report:
        try:
            asked = Round.model_validate(read_json(file))
        except ValidationError as error:
            raise invalid_document("round", error, source=str(file)) from error
        machines = load_cluster(cluster, report)
        rows = [Phase(item.name, load_model(item.model), item.job, item.repeats) for item in asked.phases]
        found = plan_round(rows, machines, top=top, gap=gap)
    if json:
        print_document(
            {
                "round_s": found.round_s,
                "phases": [
                    {
                        "name": row.name,
                        "phase_s": phase_s,
                        "reshard_s": reshard_s,
                        "plan": plan.model_dump(mode="json"),
                    }
                    for row, phase_s, reshard_s, plan in zip(
                        rows, found.phase_s, found.reshard_s, found.plans, strict=True
                    )
                ],
            }
        )
        return
    for row, phase_s, reshard_s, plan in zip(rows, found.phase_s, found.reshard_s, found.plans, strict=True):
        console().print(
            f"{row.name}: {plan_summary(plan)}, {row.repeats} steps in {seconds_text(phase_s)}, "
            f"then {seconds_text(reshard_s)} to the next layout"
        )
    console().print(f"round: {seconds_text(found.round_s)}")
