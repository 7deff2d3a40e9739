"""`stagewright simulate`: the prediction again, and its timeline."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, print_document
from stagewright.planner.errors import InvalidArgument, StagewrightError

if TYPE_CHECKING:
    from stagewright.planner.documents import ModelProfile, Plan


def simulate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan document.")],
    profile: Annotated[
        Path | None, typer.Option(help="The profile it was made for; the catalogue's model of that name unless told.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace here (opens in Perfetto).")] = None,
    json: Json = False,
) -> None:
    """Simulate a plan and print its prediction.

    Example: stagewright simulate out/plan.json --profile out/profile.json --trace trace.json
    """
    import json as json_text

    from stagewright.cli.plan import print_plan
    from stagewright.planner.documents import ModelProfile, Plan
    from stagewright.planner.documents.document import write_text
    from stagewright.planner.expectation import with_expectation
    from stagewright.planner.prediction import evaluate

    document = Plan.load(plan)
    model = ModelProfile.load(profile) if profile is not None else find_profile(document, plan)
    document.check_profile(layer_digest=model.layer_digest, num_layers=model.num_layers)
    evaluation = with_expectation(evaluate(document, model), document, model)
    if trace is not None:
        from stagewright.formats.chrome_trace import chrome_trace

        write_text(trace, json_text.dumps(chrome_trace(evaluation.timeline)))
    if json:
        print_document(evaluation.prediction.model_dump(mode="json"))
    else:
        print_plan(document.model_copy(update={"prediction": evaluation.prediction}))


def find_profile(plan: Plan, path: Path, config: str | None = None) -> ModelProfile:
    """Return the profile a plan was made for: profile.json beside the plan, that of a configuration, or the catalogue's."""
    from stagewright.planner.catalog import resolve_model
    from stagewright.planner.documents import ModelProfile

    beside = path.with_name("profile.json")
    if beside.exists():
        found = ModelProfile.load(beside)
        if found.layer_digest == plan.layer_digest:
            return found
    if config is not None:
        with suppress(StagewrightError):  # a plan of a measured model needs no analytic profile of it
            found = resolve_model(config)
            if found.layer_digest == plan.layer_digest:
                return found
    try:
        return resolve_model(plan.model)
    except InvalidArgument as error:
        raise InvalidArgument(
            f"the plan's model {plan.model!r} is not in the catalogue, and there is no fitting profile.json beside the plan",
            field="profile",
            hint="give --profile with the profile that the plan was made for",
        ) from error
