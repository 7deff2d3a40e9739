"""`stagewright cost`: fit the cost model to measured runs, and show what its formulas say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, console, print_document, seconds_text
from stagewright.planner.errors import InvalidDocument

if TYPE_CHECKING:
    from stagewright.planner.cost.fit import MeasuredRun

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Runs = Annotated[Path, typer.Argument(help="JSON: a list of {plan, profile, step_time_s or report, name, group}.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write the fitted cluster of the first run here.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="Fit only this factor; may repeat.")]


@app.command()
def fit(runs: Runs, output: Output = None, only: Only = None, json: Json = False) -> None:
    """Fit efficiencies to measured runs and say how well it predicts runs it was not shown.

    Each run names a plan file, a profile (file or catalogue name; the plan's model unless told) and its measured step
    seconds, or the report that `stagewright run -o` wrote. Runs of one `group` are held out together.

    Example: stagewright cost fit runs.json -o cluster.json
    """
    from stagewright.planner.cost.fit import Unknown, default_unknowns, fit_runs, fitted_cluster

    measured = load_runs(runs)
    unknowns = default_unknowns(measured)
    if only:
        known = {unknown.name: unknown for unknown in unknowns}
        unknowns = [known.get(name, Unknown(name)) for name in only]
    found = fit_runs(measured, unknowns)
    if output is not None:
        fitted_cluster(measured[0].plan.cluster, found.factors).save(output)
    if json:
        print_document(found.to_json())
        return
    from rich.table import Table

    table = Table("run", "measured", "before", "fitted", "held out", box=None)
    for row in found.runs:
        times = (row.measured_s, row.before_s, row.fitted_s, row.held_out_s)
        table.add_row(row.name, *(seconds_text(value) for value in times))
    console().print(table)
    for name, factor in found.factors.items():
        console().print(f"{name:<20} x {factor:.4f}", markup=False)
    for title, which in (("before", "before"), ("in sample", "fitted"), ("cross-validated", "held_out")):
        mean, worst = found.error(which)
        console().print(f"{title:<16} mean error {100 * mean:.2f} %, worst {100 * worst:.2f} %", markup=False)


@app.command()
def tensor(
    tokens: Annotated[int, typer.Option(help="Tokens of a microbatch.")] = 2048,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 4096,
    ffn: Annotated[int, typer.Option(help="Feed-forward size; 4 x hidden unless told.")] = 0,
    cluster: Annotated[str, typer.Option(help="Cluster whose links are used.")] = "a100-sxm-80g:8x8",
    devices: Annotated[int, typer.Option(help="Devices of the tensor-parallel group.")] = 64,
    json: Json = False,
) -> None:
    """Compare 1-D, 2-D, 2.5-D and 3-D tensor parallelism of a transformer layer's products.

    Example: stagewright cost tensor --tokens 65536 --hidden 8192 --devices 64
    """
    from stagewright.planner.catalog import resolve_cluster
    from stagewright.planner.cost.tensor_layouts import chain_elements, fastest_grid, grids, transformer_products

    group = resolve_cluster(cluster).groups[0]
    products = transformer_products(tokens=tokens, hidden=hidden, ffn=ffn or 4 * hidden)
    best = fastest_grid(products, devices, group)
    rows: list[dict[str, object]] = []
    for grid in grids(devices):
        counted = products[1::2] if grid.kind == "1d" else products
        rows.append(
            {
                "grid": str(grid.kind),
                "side": grid.side,
                "depth": grid.depth,
                "received_elements": chain_elements(products, grid),
                "forward_s": sum(grid.product_s(product, group) for product in counted),
                "fastest": grid == best,
            }
        )
    _print_rows(rows, json=json)


@app.command()
def context(
    sequence: Annotated[int, typer.Option(help="Sequence length.")] = 131072,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 4096,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads; heads unless told.")] = 0,
    cluster: Annotated[str, typer.Option(help="Cluster whose links are used.")] = "h100-sxm:8x4",
    degree: Annotated[int, typer.Option(help="Context-parallel degree.")] = 32,
    json: Json = False,
) -> None:
    """Compare ways of splitting a sequence: traffic of each, balance of causal orders, the best u x r.

    Example: stagewright cost context --sequence 65536 --degree 32
    """
    from stagewright.planner.catalog import resolve_cluster
    from stagewright.planner.cost import context_layouts as ctx

    group = resolve_cluster(cluster).groups[0]
    kv = kv_heads or heads
    sizes = ctx.AttentionSizes(1, sequence, hidden, heads, kv / heads)
    best = ctx.best_context_split(sizes, degree, group, kv_heads=kv)
    team, team_s = ctx.best_team(sizes, degree, group)
    traffic = {
        "tensor + sequence parallel": ctx.tensor_sequence_traffic(sizes, degree),
        "ulysses": ctx.ulysses_traffic(sizes, degree),
        "ring": ctx.ring_traffic(sizes, degree),
        "burst": ctx.burst_traffic(sizes, degree),
        "ring self-attention": ctx.ring_self_attention_traffic(sizes, degree),
        "gathered keys and values": ctx.gathered_traffic(sizes, degree),
        f"usp u={best.ulysses} r={best.ring}": ctx.usp_traffic(sizes, best.ulysses, best.ring),
        f"wallfacer C={team}": ctx.wallfacer_traffic(sizes, degree, team),
        "dsp, one switch each way": ctx.switch_traffic(sizes, degree),
    }
    rows: list[dict[str, object]] = [
        {"layout": name, "forward_elements": found.forward, "backward_elements": found.backward}
        for name, found in traffic.items()
    ]
    if json:
        balance = {str(order): ctx.causal_imbalance(degree, order) for order in ctx.TokenOrder}
        split = {"ulysses": best.ulysses, "ring": best.ring, "head_first": best.head_first, "seconds": best.seconds}
        print_document(
            {"traffic": rows, "imbalance": balance, "best": split, "team": {"size": team, "seconds": team_s}}
        )
        return
    _print_rows(rows, json=False)


@app.command()
def experts(
    tokens: Annotated[int, typer.Option(help="Tokens of a device's microbatch.")] = 4096,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 4096,
    ffn: Annotated[int, typer.Option(help="Feed-forward size of one expert.")] = 14336,
    num_experts: Annotated[int, typer.Option(help="Routed experts.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts of each token.")] = 2,
    capacity_factor: Annotated[float, typer.Option(help="Capacity factor.")] = 1.25,
    cluster: Annotated[str, typer.Option(help="Cluster whose links are used.")] = "h100-sxm:8x1",
    degree: Annotated[int, typer.Option(help="Expert-parallel degree.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sample, for attention.")] = 4096,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks through which chunks flow, attention included.")] = 4,
    skew: Annotated[
        float, typer.Option(min=0, help="Popularity of the k-th expert falls as k^-skew; hot ones move (FEPLB).")
    ] = 0.0,
    dynamic: Annotated[int, typer.Option(min=0, help="Experts of a device that may move in their node.")] = 2,
    json: Json = False,
) -> None:
    """Price one expert layer: exchange, chunks, what moves (tokens or experts); and blocks with attention in one flow.

    Example: stagewright cost experts --num-experts 8 --top-k 2 --degree 8
    """
    from stagewright.planner.catalog import resolve_cluster
    from stagewright.planner.cost import expert_routing as moe
    from stagewright.planner.cost.block_pipeline import ExpertBlock, best_flow_chunks, flow_bound_s, flow_s
    from stagewright.planner.cost.communication import flat_all_to_all_s, two_level_all_to_all_s
    from stagewright.planner.cost.expert_pipeline import ExpertLayer, Line, best_chunks
    from stagewright.planner.cost.expert_rebalance import CopyRates, rebalanced
    from stagewright.planner.cost.groups import strided_group
    from stagewright.planner.cost.roofline import Roofline

    group = resolve_cluster(cluster).groups[0]
    shape = strided_group(degree, 1, group)
    copies = tokens * top_k * capacity_factor
    size = 2 * copies * hidden
    flat, two_level = (
        (flat_all_to_all_s(size, shape), two_level_all_to_all_s(size, shape)) if degree > 1 else (0.0, 0.0)
    )
    exchange_s = min(flat, two_level)
    roofline = Roofline.of(group.device, "bf16")
    flops = 6.0 * copies * hidden * ffn
    compute_s = roofline.seconds("matmul", flops, 0.0, num_groups=max(1, num_experts // degree))
    layer = ExpertLayer(Line(shape.ring_latency_s, exchange_s), Line(3 * roofline.launch_s, compute_s))
    chunks = best_chunks(layer)
    attention_s = roofline.seconds("matmul", tokens * hidden * (8.0 * hidden + 4.0 * sequence_length), 0.0)
    block = ExpertBlock(Line(5 * roofline.launch_s, attention_s), layer)
    flowing = best_flow_chunks(block, num_blocks=blocks)
    document: dict[str, object] = {
        "exchange_elements": moe.exchange_elements(
            tokens, hidden, top_k=top_k, degree=degree, capacity_factor=capacity_factor
        ),
        "capacity": moe.capacity(tokens * degree, num_experts, top_k=top_k, capacity_factor=capacity_factor),
        "flat_all_to_all_s": flat,
        "two_level_all_to_all_s": two_level,
        "expert_compute_s": compute_s,
        "best_chunks": chunks,
        "layer_s": layer.seconds(chunks),
        "unchunked_s": layer.seconds(1),
        "blocks_one_by_one_s": blocks * block.separate_s(chunks),
        "flow_chunks": flowing,
        "blocks_in_flow_s": flow_s(block, flowing, num_blocks=blocks),
        "flow_bound_s": flow_bound_s(block, flowing, num_blocks=blocks),
        "moves_experts": moe.moves_experts(
            tokens,
            hidden,
            top_k=top_k,
            degree=degree,
            remote_experts=num_experts - num_experts // degree,
            ffn_size=1.5 * ffn,
        ),
    }
    if skew:
        rates = CopyRates(
            token_s=compute_s / copies,
            token_bytes=4.0 * hidden,
            expert_bytes=6.0 * hidden * ffn,
            copy_bytes_per_s=shape.ring_bytes_per_s,
        )
        popularity = [(expert + 1.0) ** -skew for expert in range(num_experts)]
        loads = [tokens * top_k * degree * each / sum(popularity) for each in _dealt(popularity, degree)]
        home = moe.home_placement(num_experts, degree)
        before, after = (
            rebalanced(loads, home, rates, devices_per_node=group.devices_per_node, dynamic=count)
            for count in (0, dynamic)
        )
        document |= {
            "straggler_tokens": before.straggler_tokens,
            "rebalanced_straggler": after.straggler_tokens,
            "moved_experts": len(after.moved),
            "busiest_device_s": float(before.loads.max()) * rates.token_s,
            "rebalanced_device_s": float(after.loads.max()) * rates.token_s,
            "longest_copy_s": float(after.copy_s.max()),
        }
    if json:
        print_document(document)
        return
    for name, value in document.items():
        console().print(f"{name:<24} {value:.6g}" if isinstance(value, float) else f"{name:<24} {value}", markup=False)


def _dealt(values: Sequence[float], hands: int) -> list[float]:
    """Return values so that neighbours in rank lie on different devices of `hands`: device d gets those of rank d modulo hands."""
    return [value for hand in range(hands) for value in values[hand::hands]]


@app.command()
def memory(
    parameters: Annotated[float, typer.Option(help="Parameters on a device before ZeRO.")] = 7.5e9,
    replicas: Annotated[int, typer.Option(help="Data-parallel replicas.")] = 64,
    shard: Annotated[int, typer.Option(help="Shard group (HSDP, MiCS); all replicas when 0.")] = 0,
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16 or fp8.")] = "bf16",
    json: Json = False,
) -> None:
    """Show parameters, gradients and optimizer of a device by ZeRO stage, and the traffic of each stage.

    Example: stagewright cost memory --parameters 7.5e9 --replicas 64
    """
    from stagewright.planner.cost.memory import device_state_bytes
    from stagewright.planner.documents import Degrees, Optimizer

    optimizer = Optimizer.standard("adam", precision)
    rows: list[dict[str, object]] = []
    for zero in range(4):
        found = device_state_bytes(
            parameters, 0.0, Degrees(dp=replicas, zero=zero), optimizer, shard_size=shard or None
        )
        share = (replicas - 1) / replicas
        rows.append(
            {
                "zero": zero,
                "parameters_bytes": found.parameters,
                "gradients_bytes": found.gradients,
                "master_weights_bytes": found.master_weights,
                "optimizer_bytes": found.optimizer,
                "total_bytes": found.total,
                "traffic_elements": (3 if zero == 3 else 2) * parameters * share,
            }
        )
    _print_rows(rows, json=json)


def load_runs(path: Path) -> list[MeasuredRun]:
    """Return the measured runs of a file; paths inside are relative to it."""
    from stagewright.planner.documents.document import read_json

    value = read_json(path)
    rows = value.get("runs") if isinstance(value, Mapping) else value
    if not isinstance(rows, list):
        raise InvalidDocument(
            f"{path}: a list of runs was expected",
            field="runs",
            hint='[{"plan": "plan.json", "profile": "profile.json", "step_time_s": 1.42}, ...]',
        )
    return [_run(row, index, path.parent) for index, row in enumerate(rows)]


def _run(row: object, index: int, folder: Path) -> MeasuredRun:
    from stagewright.planner.catalog import resolve_model
    from stagewright.planner.cost.fit import MeasuredRun
    from stagewright.planner.documents import Plan
    from stagewright.planner.documents.document import read_json

    where = f"runs[{index}]"
    if not isinstance(row, Mapping) or not isinstance(row.get("plan"), str):
        raise InvalidDocument(f"{where} needs a plan file", field=f"{where}.plan")
    unknown = sorted(set(row) - {"plan", "profile", "step_time_s", "report", "name", "group"})
    if unknown:
        raise InvalidDocument(f"{where}: unknown field {unknown[0]!r}", field=f"{where}.{unknown[0]}")
    plan = Plan.load(folder / row["plan"])
    text = row.get("profile", plan.model)
    candidate = folder / str(text)
    profile = resolve_model(str(candidate) if candidate.exists() else str(text))
    seconds = row.get("step_time_s")
    if seconds is None and isinstance(row.get("report"), str):
        seconds = _reported_s(read_json(folder / row["report"]), where)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise InvalidDocument(f"{where}.step_time_s is {seconds!r}, a number is needed", field=f"{where}.step_time_s")
    return MeasuredRun(str(row.get("name", row["plan"])), plan, profile, float(seconds), str(row.get("group", "")))


def _reported_s(report: object, where: str) -> object:
    measured = report.get("measured") if isinstance(report, Mapping) else None
    step = measured.get("step_time_s") if isinstance(measured, Mapping) else None
    if isinstance(step, Mapping):
        return step.get("median")
    raise InvalidDocument(f"{where}.report has no measured.step_time_s.median", field=f"{where}.report")


def _print_rows(rows: list[dict[str, object]], *, json: bool) -> None:
    if json:
        print_document([*rows])
        return
    from rich.table import Table

    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()))
    console().print(table)
