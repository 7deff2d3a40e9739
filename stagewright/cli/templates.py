"""`stagewright templates`: pipelines for every node count, so that lost nodes cost no planning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stagewright.cli.output import Json, console, print_document, progress_bar, seconds_text


def templates(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Profile or config.json by path, or a catalogue name.")],
    cluster: Annotated[str, typer.Option(help="File, catalogue name, DEVICE:PER_NODExNODES, or `local`.")],
    tolerate: Annotated[int, typer.Option(min=0, help="Nodes that may be lost at once.")] = 1,
    global_batch: Annotated[int, typer.Option(help="Samples of one optimizer step, whatever is lost.")] = 256,
    microbatch: Annotated[int, typer.Option(min=1, help="Samples of a microbatch, the same in every pipeline.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a sample; the model's own unless told.")
    ] = None,
    least_nodes: Annotated[
        int | None, typer.Option(min=1, help="Fewest nodes of a pipeline; the fewest that hold the model unless told.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the templates here.")] = None,
    json: Json = False,
) -> None:
    """Plan a pipeline for every number of nodes, and prove that every loss of some nodes is covered by them.

    Example: stagewright templates llama2-7b --cluster a100-sxm-80g:8x6 --tolerate 1 --global-batch 192
    """
    from stagewright.cli.inputs import load_cluster, load_model
    from stagewright.cli.plan import profile_sequence
    from stagewright.planner.documents import TrainingJob
    from stagewright.planner.pipeline_templates import pipeline_templates
    from stagewright.planner.plan_summary import plan_summary

    with progress_bar(quiet=json) as report:
        profile = load_model(model)
        machines = load_cluster(cluster, report)
        job = TrainingJob(global_batch=global_batch, sequence_length=profile_sequence(profile, sequence_length))
        found = pipeline_templates(
            profile,
            machines,
            job,
            tolerate=tolerate,
            microbatch=microbatch,
            least_nodes=least_nodes,
            report=report,
        )
    if output is not None:
        found.save(output)
    if json:
        print_document(found.model_dump(mode="json"))
        return
    screen = console()
    for template in found.templates:
        screen.print(
            f"template of {template.num_nodes} nodes: {plan_summary(template.plan)}, {seconds_text(template.first_s)} + "
            f"{seconds_text(template.each_s)} a microbatch"
        )
    for cover in found.covers:
        pipelines = " + ".join(str(size) for size in cover.pipelines)
        screen.print(
            f"{cover.num_nodes} nodes = {pipelines}: step {seconds_text(cover.step_time_s)}, "
            f"microbatches {' + '.join(map(str, cover.microbatches))}, loses {cover.tolerates} without a checkpoint"
        )
    screen.print(
        f"proved: all {found.losses_checked} losses of at most {tolerate} nodes leave a replica and have a cover"
    )
