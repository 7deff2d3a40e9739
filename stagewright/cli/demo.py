"""`stagewright demo`: the main job on this machine, from measuring the example model to comparing the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stagewright.cli.output import Json, console, print_document, progress_bar
from stagewright.planner.errors import InvalidArgument, RunFailed

EXAMPLE = Path("examples/gpt.py")


def demo(
    model: Annotated[Path, typer.Option(help="The example to train; holds build() and data().")] = EXAMPLE,
    out: Annotated[Path, typer.Option(help="Where the documents and the picture go.")] = Path("out"),
    steps: Annotated[int, typer.Option(help="Timed training steps.")] = 20,
    global_batch: Annotated[int, typer.Option(help="Samples of one step.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 128,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure everything again.")] = False,
    json: Json = False,
) -> None:
    """Profile the example GPT on this machine, plan it, run the plan, and put prediction beside measurement.

    Example: stagewright demo
    """
    from stagewright.cli.plan import print_plan
    from stagewright.cli.workflow import (
        Workload,
        best_plan,
        local_cluster,
        measured_profile,
        print_report,
        save_run,
        training_job,
    )
    from stagewright.runtime.run import run_plan

    if not model.exists():
        raise InvalidArgument(
            f"{model} does not exist", field="model", hint="run this in the repository, or give --model"
        )
    out.mkdir(parents=True, exist_ok=True)
    workload = Workload(f"{model}:build", f"{model}:data", global_batch, sequence_length)
    with progress_bar(quiet=json) as report:
        cluster = local_cluster(out / "cluster.json", report, refresh=refresh)
        profile = measured_profile(workload, cluster, out, report, refresh=refresh)
        plan = best_plan(profile, cluster, training_job(workload), report)
        plan.save(out / "plan.json")
        result = run_plan(plan, profile, model=workload.model, data=workload.data, steps=steps, progress=report)
    save_run(out, plan, result)
    if json:
        print_document(result.to_json())
    else:
        print_plan(plan)
        print_report(result)
        console().print(f"see {out}/timeline.html; the documents are beside it")
    if not result.passed:
        raise RunFailed("a check failed", hint=f"{out}/run.json holds the numbers")
