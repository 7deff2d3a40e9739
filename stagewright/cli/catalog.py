"""`stagewright catalog`: the devices, models and clusters that commands know by name."""

from __future__ import annotations

from typing import Annotated

import typer

from stagewright.cli.output import Json, bytes_text, console, print_document

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Filter = Annotated[str, typer.Argument(help="Only names that hold this text.")]


@app.command()
def gpus(name: Filter = "", json: Json = False) -> None:
    """List devices: dense rates by dtype, memory, bandwidth, and where the numbers were published.

    Example: stagewright catalog gpus h100
    """
    from stagewright.planner.catalog import device_entries

    entries = [entry for entry in device_entries() if name.lower() in entry.name or name.lower() in entry.aliases]
    if json:
        print_document([entry.model_dump(mode="json") for entry in entries])
        return
    from rich.table import Table

    table = Table("device", "memory", "bandwidth", "bf16/fp16 dense", "fp8", "node link", "reference", box=None)
    for entry in entries:
        flops = entry.device.flops
        half = flops.get("bf16") or flops.get("fp16") or flops.get("fp32", 0.0)
        table.add_row(
            entry.name,
            bytes_text(entry.device.memory_bytes),
            f"{entry.device.memory_bytes_per_s / 1e9:,.0f} GB/s",
            f"{half / 1e12:,.4g} TFLOP/s",
            f"{flops['fp8'] / 1e12:,.4g}" if "fp8" in flops else "",
            f"{entry.node_link.name} {entry.node_link.bytes_per_s / 1e9:,.0f} GB/s",
            entry.device.reference,
        )
    console().print(table)


@app.command()
def models(name: Filter = "", json: Json = False) -> None:
    """List models: parameters, layers, sizes, and where the config was published.

    Example: stagewright catalog models llama
    """
    from stagewright.planner.catalog import model_entries

    rows: list[object] = []
    for entry in model_entries():
        if name.lower() not in entry.name:
            continue
        profile = entry.profile()
        architecture = profile.architecture
        rows.append(
            {
                "name": entry.name,
                "parameters": profile.num_parameters - entry.prediction_parameters,
                "prediction_parameters": entry.prediction_parameters,
                "published_parameters": entry.parameters,
                "published": entry.published,
                "layers": profile.num_layers,
                "is_chain": profile.is_chain,
                "architecture": architecture.model_dump(mode="json") if architecture else None,
                "reference": entry.reference,
            }
        )
    if json:
        print_document(rows)
        return
    from rich.table import Table

    table = Table("model", "parameters", "published", "layers", "hidden", "heads", "experts", "reference", box=None)
    for row in rows:
        assert isinstance(row, dict)
        sizes = row["architecture"] or {}
        exact = row["published_parameters"]
        table.add_row(
            str(row["name"]),
            f"{row['parameters']:,}",
            f"{exact:,}" if exact else str(row["published"]),
            str(row["layers"]),
            str(sizes.get("hidden_size") or ""),
            f"{sizes.get('num_heads') or ''}/{sizes.get('num_kv_heads') or ''}".strip("/"),
            str(sizes.get("num_experts") or ""),
            str(row["reference"]),
        )
    console().print(table)


@app.command()
def clusters(name: Filter = "", json: Json = False) -> None:
    """List clusters: nodes, devices, links. A name takes a number of nodes: dgx-h100:16.

    Example: stagewright catalog clusters dgx
    """
    from stagewright.planner.catalog import cluster_entries

    entries = [entry for entry in cluster_entries() if name.lower() in entry.name or name.lower() in entry.aliases]
    if json:
        print_document([entry.model_dump(mode="json") for entry in entries])
        return
    from rich.table import Table

    table = Table("cluster", "nodes", "devices of a node", "reference", box=None)
    for entry in entries:
        groups = " + ".join(f"{group.devices_per_node} {group.device}" for group in entry.groups)
        table.add_row(entry.name, str(entry.nodes), groups, entry.reference)
    console().print(table)
