"""`stagewright cluster`: discover this machine, show a cluster, check one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.inputs import load_cluster
from stagewright.cli.output import Json, bytes_text, console, print_document, progress_bar, seconds_text

if TYPE_CHECKING:
    from stagewright.planner.documents import Cluster

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

ClusterText = Annotated[str, typer.Argument(help="File, catalogue name, DEVICE:PER_NODExNODES, or `local`.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write the cluster document here.")]


@app.command()
def discover(output: Output = None, json: Json = False) -> None:
    """Describe this machine's devices and links as a cluster document; needs the `torch` extra.

    Example: stagewright cluster discover -o cluster.json
    """
    with progress_bar(quiet=json) as progress:
        cluster = load_cluster("local", progress)
    if output is not None:
        cluster.save(output)
    _show(cluster, json=json)


@app.command()
def show(cluster: ClusterText, output: Output = None, json: Json = False) -> None:
    """Show a cluster: groups, devices, memory, links.

    Example: stagewright cluster show a100-sxm-80g:8x4+v100-sxm-32g:8x4
    """
    with progress_bar(quiet=json) as progress:
        found = load_cluster(cluster, progress)
    if output is not None:
        found.save(output)
    _show(found, json=json)


@app.command()
def lint(cluster: ClusterText, json: Json = False) -> None:
    """Check a cluster for numbers that cannot be right: rates, bandwidths, latencies out of any device's range.

    Example: stagewright cluster lint cluster.json
    """
    from stagewright.planner.catalog.lint import lint_cluster

    with progress_bar(quiet=json) as progress:
        found = load_cluster(cluster, progress)
    warnings = lint_cluster(found)
    if json:
        print_document({"cluster": found.name, "num_devices": found.num_devices, "warnings": warnings})
        return
    for warning in warnings:
        console().print(warning, markup=False)
    console().print(f"{found.name}: {found.num_devices} devices, {len(warnings)} warnings", markup=False)


def _show(cluster: Cluster, *, json: bool) -> None:
    if json:
        print_document(cluster.model_dump(mode="json"))
        return
    from rich.table import Table

    table = Table(
        "group", "nodes", "device", "memory", "links", title=f"{cluster.name}: {cluster.num_devices} devices", box=None
    )
    for group in cluster.groups:
        links = "; ".join(
            f"{level.name} joins {level.num_devices}: {level.bytes_per_s * level.achieved_share / 1e9:.4g} GB/s, "
            f"{seconds_text(level.latency_s)}"
            for level in group.links
        )
        table.add_row(
            group.name,
            f"{group.num_nodes} x {group.devices_per_node}",
            group.device.name,
            bytes_text(group.device.memory_bytes),
            links,
        )
    console().print(table)
