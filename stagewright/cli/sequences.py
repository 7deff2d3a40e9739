"""`stagewright sequences`: context-parallel groups and attention blocks for a batch of sequences of different length."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from stagewright.cli.output import Json, console, print_document, progress_bar, seconds_text
from stagewright.planner.errors import InvalidArgument


def sequences(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Profile or config.json by path, or a catalogue name.")],
    cluster: Annotated[str, typer.Option(help="A cluster of one kind: DEVICE:PER_NODExNODES, or a file.")],
    lengths: Annotated[str, typer.Option(help="Tokens of each sequence, e.g. 32768,1024x31.")],
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage of the states, over all devices.")] = 3,
    block: Annotated[int, typer.Option(min=1, help="Tokens of an attention block.")] = 1024,
    gap: Annotated[float, typer.Option(min=0, help="Gap to prove before stopping.")] = 0.0,
    json: Json = False,
) -> None:
    """Group the devices for sequences of different length (FlexSP), and place their attention blocks (DCP).

    Example: stagewright sequences llama2-7b --cluster a100-sxm-80g:8x1 --lengths 32768,1024x31
    """
    from stagewright.cli.inputs import load_cluster, load_model
    from stagewright.planner.block_placement import (
        Blocks,
        BlockSizes,
        loads_of,
        place_blocks,
        ring_volume_bytes,
        volume_bytes,
    )
    from stagewright.planner.documents import TrainingJob
    from stagewright.planner.sequence_groups import group_sequences, sequence_costs, uniform_step_s

    counts = parse_lengths(lengths)
    with progress_bar(quiet=json) as report:
        profile = load_model(model)
        machines = load_cluster(cluster, report)
        job = TrainingJob(global_batch=1, sequence_length=max(counts))
        costs = sequence_costs(profile, machines, job, list(counts), zero=zero)
        found = group_sequences(costs, counts, machines.num_devices, gap=gap)
        uniform = {degree: uniform_step_s(costs, counts, machines.num_devices, degree) for degree in costs.degrees}
        each = [length for length, count in counts.items() for _ in range(count)]
        blocks = Blocks.causal(each, block)
        sizes = BlockSizes.of(profile, block)
        placed = place_blocks(blocks, machines.num_devices, sizes)
    sent = {
        "blocks_bytes": volume_bytes(blocks, placed, sizes),
        "ring_bytes": ring_volume_bytes(blocks, machines.num_devices, sizes),
        "block_loads": loads_of(blocks, placed, machines.num_devices).tolist(),
    }
    if json:
        groups = [
            {"degree": group.degree, "counts": {str(k): n for k, n in group.counts}, "seconds": group.seconds}
            for group in found.groups
        ]
        fitting = {str(degree): step for degree, step in uniform.items() if step != float("inf")}
        print_document(
            {"step_s": found.step_s, "bound_s": found.bound_s, "groups": groups, "uniform_step_s": fitting, **sent}
        )
        return
    for group in found.groups:
        held = ", ".join(f"{count} of {length} tokens" for length, count in group.counts)
        console().print(f"group of {group.degree} devices: {held}, {seconds_text(group.seconds)}")
    console().print(f"step {seconds_text(found.step_s)}, at least {seconds_text(found.bound_s)} for any grouping")
    for degree, step_s in uniform.items():
        text = seconds_text(step_s) if step_s != float("inf") else "does not fit"
        console().print(f"all groups of {degree}: {text}")
    console().print(
        f"attention blocks a layer: {sent['blocks_bytes']:.4g} bytes between devices, {sent['ring_bytes']:.4g} in a ring over all"
    )


def parse_lengths(text: str) -> dict[int, int]:
    """Return how many sequences of each length a text such as 32768,1024x31 names; raises InvalidArgument."""
    counts: dict[int, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:x(\d+))?\s*", part)
        if match is None or int(match[1]) < 1 or int(match[2] or 1) < 1:
            raise InvalidArgument(
                f"{part!r} is no length, or LENGTHxCOUNT", field="lengths", hint="write 32768,1024x31"
            )
        counts[int(match[1])] = counts.get(int(match[1]), 0) + int(match[2] or 1)
    return counts
