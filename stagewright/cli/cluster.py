"""`stagewright cluster`: discover this machine, show a cluster, check one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, bytes_text, console, print_document, progress_bar, seconds_text

if TYPE_CHECKING:
    from stagewright.planner.documents import Cluster

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Discover, show or check a cluster."
)


@app.command()
def discover(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the cluster here.")] = None,
    devices: Annotated[int | None, typer.Option(help="Use fewer devices than there are.")] = None,
    no_network: Annotated[bool, typer.Option("--no-network", help="Do not measure the links.")] = False,
    json: Json = False,
) -> None:
    """Measure this machine: every CUDA device, else one rank for each core.

    Example: stagewright cluster discover -o cluster.json
    """
    from stagewright.profiler.discover import discover_local

    with progress_bar(quiet=json) as report:
        cluster = discover_local(max_devices=devices, measure_network=not no_network, progress=report)
    if output is not None:
        cluster.save(output)
    _show(cluster, json)


@app.command()
def show(
    cluster: Annotated[str, typer.Argument(metavar="CLUSTER", help="File, catalogue name, or DEVICE:PER_NODExNODES.")],
    json: Json = False,
) -> None:
    """Show a cluster: its groups, devices and links.

    Example: stagewright cluster show h100-sxm:8x16
    """
    from stagewright.planner.catalog import resolve_cluster

    _show(resolve_cluster(cluster), json)


@app.command()
def lint(
    cluster: Annotated[str, typer.Argument(metavar="CLUSTER", help="File, catalogue name, or DEVICE:PER_NODExNODES.")],
    json: Json = False,
) -> None:
    """Check a cluster for numbers that look wrong: units, outer links faster than inner ones, missing rates.

    Example: stagewright cluster lint cluster.json
    """
    from stagewright.planner.catalog import resolve_cluster

    warnings = oddities(resolve_cluster(cluster))
    if json:
        print_document({"warnings": list(warnings)})
    else:
        for line in warnings or ["nothing looks wrong"]:
            console().print(line)


def oddities(cluster: Cluster) -> list[str]:
    """Return what looks wrong, one sentence each."""
    found = []
    for group in cluster.groups:
        where = f"group {group.name}"
        if group.device.memory_bytes < 2**30:
            found.append(f"{where}: the device has {group.device.memory_bytes:g} bytes of memory; is that GB?")
        if max(group.device.flops.values()) < 1e9:
            found.append(
                f"{where}: the device's fastest rate is {max(group.device.flops.values()):g} FLOP/s; is that TFLOP/s?"
            )
        for inner, outer in zip(group.links, group.links[1:], strict=False):
            if outer.bytes_per_s > inner.bytes_per_s:
                found.append(f"{where}: link {outer.name} is faster than {inner.name} inside it")
        for link in group.links:
            if link.bytes_per_s < 1e6:
                found.append(f"{where}: link {link.name} has {link.bytes_per_s:g} bytes/s; is that GB/s?")
            if link.latency_s > 0.1:
                found.append(f"{where}: link {link.name} has a latency of {link.latency_s:g} s; is that us?")
    return found


def _show(cluster: Cluster, json: bool) -> None:
    if json:
        print_document(cluster.model_dump(mode="json"))
        return
    from rich.table import Table

    screen = console()
    screen.print(f"[bold]{cluster.name}[/bold]: {cluster.num_devices} devices in {len(cluster.groups)} group(s)")
    for group in cluster.groups:
        device = group.device
        rates = ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in device.flops.items())
        screen.print(
            f"{group.name}: {group.num_nodes} x {group.devices_per_node} {device.name}, {bytes_text(device.memory_bytes)}, {rates}"
        )
        table = Table("link", "joins", "latency", "bandwidth", "source", box=None)
        for link in group.links:
            rate = f"{link.bytes_per_s / 1e9:.4g} GB/s"
            table.add_row(link.name, str(link.num_devices), seconds_text(link.latency_s), rate, link.source.value)
        screen.print(table)
