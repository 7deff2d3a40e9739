"""`stagewright hetpipe`: virtual workers of mixed GPUs, and what their waves earn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from stagewright.cli.output import Json, console, print_document, progress_bar, seconds_text
from stagewright.planner.errors import InvalidArgument

if TYPE_CHECKING:
    from stagewright.planner.planners.hetpipe import Allocation


def hetpipe(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Profile or config.json by path, or a catalogue name.")],
    cluster: Annotated[str, typer.Option(help="A mixed cluster: DEVICE:PER_NODExNODES joined by +, or a file.")],
    policy: Annotated[str, typer.Option(help="node, equal or hybrid: which GPUs make a virtual worker.")] = "node",
    minibatch: Annotated[int, typer.Option(min=1, help="Samples of a minibatch.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a sample; the model's own unless told.")
    ] = None,
    distance: Annotated[int, typer.Option(min=0, help="Clock distance D that workers may drift apart.")] = 0,
    json: Json = False,
) -> None:
    """Cut the model over virtual workers of mixed GPUs under wave-synchronous parallelism (HetPipe).

    Example: stagewright hetpipe gpt2 --cluster a100-sxm-80g:4x1+v100-sxm-32g:4x1 --policy equal --minibatch 4
    """
    from stagewright.cli.inputs import load_cluster, load_model
    from stagewright.cli.plan import profile_sequence
    from stagewright.planner.documents import TrainingJob
    from stagewright.planner.planners.hetpipe import (
        allocate,
        chain_costs,
        most_missing,
        nodes_of,
        plan_worker,
        push_pull_s,
        samples_per_s,
    )

    if policy not in ("node", "equal", "hybrid"):
        raise InvalidArgument(f"there is no policy {policy!r}", field="policy", hint="node, equal or hybrid")
    with progress_bar(quiet=json) as report:
        profile = load_model(model)
        machines = load_cluster(cluster, report)
        job = TrainingJob(global_batch=minibatch, sequence_length=profile_sequence(profile, sequence_length))
        costs = chain_costs(profile, machines, job)
        workers = [
            plan_worker(costs, gpus) for gpus in allocate(nodes_of(profile, machines, job), cast("Allocation", policy))
        ]
        extra_s = [push_pull_s(profile, machines, job)] * len(workers)
    rate = samples_per_s(workers, minibatch, extra_s)
    missing = [most_missing(worker.in_flight, distance) for worker in workers]
    rows = [
        {
            "gpus": [gpu.kind for gpu in worker.gpus],
            "layers": list(worker.bounds),
            "in_flight": worker.in_flight,
            "minibatch_s": worker.minibatch_s,
            "wave_s": worker.wave_s,
            "most_missing_updates": misses,
        }
        for worker, misses in zip(workers, missing, strict=True)
    ]
    if json:
        print_document({"samples_per_s": rate, "push_pull_s": extra_s[0], "workers": rows})
        return
    for index, (worker, misses) in enumerate(zip(workers, missing, strict=True)):
        console().print(
            f"worker {index}: {' '.join(gpu.kind for gpu in worker.gpus)}, layers cut at {worker.bounds}, "
            f"{worker.in_flight} minibatches a wave of {seconds_text(worker.wave_s)}, "
            f"misses at most {misses} updates of another worker"
        )
    console().print(f"{rate:,.2f} samples/s together, {seconds_text(extra_s[0])} to push and pull a wave")
