"""`stagewright run`: execute a plan (or profile and plan a model first) and compare it with its prediction."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, print_document, progress_bar
from stagewright.planner.errors import InvalidArgument, RunFailed

if TYPE_CHECKING:
    from stagewright.planner.documents import ModelProfile, Plan


def run(
    plan_or_model: Annotated[
        str,
        typer.Argument(
            metavar="PLAN_OR_MODEL",
            help="plan.json, or module:factory, path.py:factory or a Hugging Face config.json.",
        ),
    ],
    torchrun_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- TORCHRUN...]", help="Passed to torchrun.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's factory or config.json; needed with a plan.")] = None,
    data: Annotated[str | None, typer.Option(help="The data's factory; the model file's `data` unless told.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="The plan's profile; profile.json beside the plan unless told.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster to plan for, given a model; this machine unless told.")
    ] = None,
    global_batch: Annotated[int, typer.Option(help="Samples of one step, given a model.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sample, given a model.")] = 128,
    steps: Annotated[int, typer.Option(help="Timed training steps.")] = 20,
    check: Annotated[
        str, typer.Option(help="gradients, memory, traffic, time; joined by commas.")
    ] = "gradients,memory,traffic,time",
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Actions wait their planned time; communication is real.")
    ] = False,
    replay: Annotated[str | None, typer.Option(help="RANK or all: one rank's part at a time on one device.")] = None,
    autocast: Annotated[
        str | None, typer.Option(help="bf16: matrix products in bf16 over weights, gradients and states in fp32.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Of the plan's optimizer.")] = 1e-3,
    momentum: Annotated[float, typer.Option(help="Of the plan's optimizer, where it is sgd-momentum.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Of the plan's optimizer.")] = 0.0,
    learning_rate_schedule: Annotated[
        str | None,
        typer.Option(help="module:function or path.py:function; the factor of the learning rate in step 0, 1, ..."),
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help="Largest norm of the whole model's gradient, over all ranks.")
    ] = None,
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="Take no step whose gradient is not finite.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Directory for checkpoints; any plan can go on from them.")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; the last step is always saved.")
    ] = None,
    load: Annotated[Path | None, typer.Option(help="Checkpoint to go on from, or the directory of several.")] = None,
    fallback: Annotated[
        list[Path] | None,
        typer.Option(help="Plan to go on with, from the last checkpoint, when a rank is lost; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the report here, timeline.html beside it.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a plan with torch and compare measured with predicted step time and memory; given a model, profile and plan it first.

    Example: stagewright run out/plan.json --model examples/gpt.py:build --steps 10 -o out/run.json
    """
    from stagewright.cli.inputs import is_config, is_factory, load_cluster
    from stagewright.cli.workflow import (
        Workload,
        best_plan,
        local_cluster,
        measured_profile,
        print_report,
        save_run,
        training_job,
    )
    from stagewright.planner.documents import Plan
    from stagewright.runtime.elastic import run_elastic
    from stagewright.runtime.run import RunOptions, run_plan
    from stagewright.runtime.training import TrainingSettings

    if fallback and (emulate or replay is not None):
        raise InvalidArgument("a run with fallbacks computes on every rank", field="fallback")
    checks = tuple(name.strip() for name in check.split(",") if name.strip())
    out = Path("out") if output is None else output.parent
    with progress_bar(quiet=json) as report:
        if is_factory(plan_or_model) or is_config(plan_or_model):
            out.mkdir(parents=True, exist_ok=True)
            factory = plan_or_model
            workload = Workload(factory, data, global_batch, sequence_length)
            machines = (
                local_cluster(out / "cluster.json", report, refresh=False)
                if cluster in (None, "local")
                else load_cluster(str(cluster), report)
            )
            model_profile = measured_profile(workload, machines, out, report, refresh=False)
            document = _under_autocast(best_plan(model_profile, machines, training_job(workload), report), autocast)
            document.save(out / "plan.json")
        else:
            if model is None:
                raise InvalidArgument(
                    "a plan does not name code",
                    field="model",
                    hint="add --model module:factory, --model path.py:factory or --model config.json",
                )
            factory = model
            document = _under_autocast(Plan.load(plan_or_model), autocast)
            model_profile = _profile_of(document, Path(plan_or_model), profile, factory)
            document.check_profile(layer_digest=model_profile.layer_digest, num_layers=model_profile.num_layers)
            if is_config(factory) and model_profile.architecture is not None:
                document, model_profile = _over_layers(document, model_profile, factory)
            if output is not None:
                out.mkdir(parents=True, exist_ok=True)
        training = TrainingSettings(
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            learning_rate_schedule=learning_rate_schedule,
            clip_norm=clip_norm,
            skip_nonfinite=skip_nonfinite,
            save=None if save is None else str(save),
            save_every=save_every,
            load=None if load is None else str(load),
        )
        options = RunOptions(
            model=factory,
            data=data,
            steps=steps,
            checks=checks,
            training=training,
            torchrun_arguments=tuple(torchrun_arguments or ()),
            progress=report,
        )
        if fallback:
            fallbacks = [_under_autocast(Plan.load(path), autocast) for path in fallback]
            result = run_elastic(document, fallbacks, model_profile, **options)
        else:
            result = run_plan(document, model_profile, emulate=emulate, replay=replay, **options)
    if output is not None:
        save_run(out, document, result)
        if output.name != "run.json":
            (out / "run.json").replace(output)
    if json:
        print_document(json_text.loads(json_text.dumps(result.to_json())))
    else:
        print_report(result)
    if not result.passed:
        raise RunFailed("a check failed", hint="the report holds the numbers")


def _under_autocast(plan: Plan, autocast: str | None) -> Plan:
    """Return the plan with its products in this type; without one, as it is."""
    if autocast is None:
        return plan
    parameters = {**plan.schedule.parameters, "autocast": autocast}
    return plan.model_copy(update={"schedule": plan.schedule.model_copy(update={"parameters": parameters})})


def _profile_of(plan: Plan, path: Path, told: Path | None, model: str) -> ModelProfile:
    from stagewright.cli.inputs import is_config
    from stagewright.cli.simulate import find_profile
    from stagewright.planner.documents import ModelProfile

    if told is not None:
        return ModelProfile.load(told)
    return find_profile(plan, path, model if is_config(model) else None)


def _over_layers(plan: Plan, profile: ModelProfile, model: str) -> tuple[Plan, ModelProfile]:
    """Return a plan and its analytic profile over the layers of the model that a configuration makes."""
    from stagewright.modeling import split
    from stagewright.modeling.hugging_face import huggingface_model
    from stagewright.profiler.analytic_layers import over_layers

    found = over_layers(profile, split(huggingface_model(model)))
    return plan.model_copy(update={"layer_digest": found.layer_digest, "profile_digest": found.digest}), found
