"""`stagewright profile`: measure a model or the network; show, compare, merge, freeze and calibrate profiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from typer.core import TyperGroup

from stagewright.cli.output import Json, bytes_text, console, print_document, progress_bar, seconds_text
from stagewright.planner.errors import InvalidArgument

if TYPE_CHECKING:
    from typer import Context

    from stagewright.planner.documents import Cluster, ModelProfile
    from stagewright.planner.documents.document import Document
    from stagewright.profiler.profile_diff import ProfileDiff
    from stagewright.profiler.ranks import ReportsProgress

Shown = TypeVar("Shown", bound="Document")


class _MeasuresByDefault(TyperGroup):
    """`profile MODEL` stands for `profile model MODEL`."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put the command's name in front unless one is named, or help is asked for."""
        named = next((text for text in args if not text.startswith("-")), None)
        if args and named not in self.commands and args[0] not in ("--help", "-h"):
            args = ["model", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_MeasuresByDefault, no_args_is_help=True, rich_markup_mode=None)

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write the document here.")]


@app.command("model")
def model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="module:factory, path.py:factory, or a Hugging Face config.json.")
    ],
    output: Output = None,
    microbatches: Annotated[
        str, typer.Option(help="Samples of a microbatch to measure, separated by commas.")
    ] = "1,2,4",
    sequence_length: Annotated[str, typer.Option(help="Sequence lengths to measure, separated by commas.")] = "128",
    tensor_degrees: Annotated[str, typer.Option(help="Tensor degrees to measure, separated by commas.")] = "1",
    busy_ranks: Annotated[
        int | None, typer.Option(help="Ranks the run will keep busy on this machine; on CPU one a core unless told.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of each rank on CPU.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp64, fp32, bf16 or fp16.")] = "fp32",
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd or sgd-momentum: whose step is timed.")] = "adamw",
    data: Annotated[
        str | None, typer.Option(help="module:factory of batches; `data` beside the model unless told.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Pattern of the modules that are layers, such as 'model.layers.*'.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile each layer with torch.compile first.")] = False,
    cache_policy: Annotated[
        str, typer.Option(help="hot: a layer finds what the one before it left in the caches; flushed: nothing.")
    ] = "hot",
    budget: Annotated[float, typer.Option(help="About how many seconds measuring may take.")] = 30.0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of what was measured; the user's cache unless told.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing, use nothing kept.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted profile stopped.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what the cache holds.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the model in the profile.")] = None,
    json: Json = False,
) -> None:
    """Measure every layer of a model on this machine.

    Example: stagewright profile examples/gpt.py:build -o profile.json
    """
    from stagewright.planner.cores import num_cores
    from stagewright.profiler.model_profile import profile_model

    _check_writable(output)
    folder = None if no_cache else cache or default_cache()
    with progress_bar(quiet=json) as report:
        document = profile_model(
            model,
            microbatches=_numbers(microbatches, "microbatches"),
            sequence_length=_numbers(sequence_length, "sequence-length"),
            tensor_degrees=_numbers(tensor_degrees, "tensor-degrees"),
            num_busy_ranks=max(num_cores() // max(threads, 1), 1) if busy_ranks is None else busy_ranks,
            num_threads=threads,
            device=device,
            dtype=_choice(dtype, ("fp64", "fp32", "bf16", "fp16"), "dtype"),  # type: ignore[arg-type]
            optimizer=_choice(optimizer, ("adamw", "adam", "sgd", "sgd-momentum"), "optimizer"),  # type: ignore[arg-type]
            data=data,
            layers=layers,
            compiled=compile,
            cache_policy=_choice(cache_policy, ("hot", "flushed"), "cache-policy"),  # type: ignore[arg-type]
            budget_s=budget,
            cache=folder,
            resume=resume,
            refresh=refresh,
            name=name,
            progress=report,
        )
    _deliver(document, output, json, print_profile)


@app.command("network")
def network(
    output: Output = None,
    ranks: Annotated[int | None, typer.Option(help="Devices to use; all unless told.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    budget: Annotated[float, typer.Option(help="About how many seconds measuring may take.")] = 12.0,
    from_log: Annotated[
        list[Path] | None, typer.Option("--from", help="Take the numbers from nccl-tests output instead; may repeat.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="With --from: the cluster whose innermost fitting level gets the numbers.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure devices and the links between them, here or (under torchrun) over every node of a job; or read nccl-tests.

    Example: stagewright profile network -o cluster.json
    """
    _check_writable(output)
    with progress_bar(quiet=json) as report:
        document = (
            _network_from_logs(from_log, cluster) if from_log else _measured_network(ranks, device, budget, report)
        )
    if document is not None:
        _deliver(document, output, json, print_network)


@app.command("show")
def show(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile document.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with charts here.")] = None,
    json: Json = False,
) -> None:
    """Show a profile as a table, or as a page with charts.

    Example: stagewright profile show profile.json --html profile.html
    """
    from stagewright.planner.documents import ModelProfile
    from stagewright.planner.documents.document import write_text
    from stagewright.profiler.profile_html import profile_html

    document = ModelProfile.load(profile)
    if html is not None:
        write_text(html, profile_html(document))
    _deliver(document, None, json, print_profile)


@app.command("diff")
def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A profile document.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="A profile document.")],
    tolerance: Annotated[float, typer.Option(help="Relative change of a time that counts.")] = 0.03,
    json: Json = False,
) -> None:
    """Show what changed between two profiles, beyond the spread of measuring.

    Example: stagewright profile diff before.json after.json
    """
    from stagewright.planner.documents import ModelProfile
    from stagewright.profiler.profile_diff import diff_profiles

    found = diff_profiles(ModelProfile.load(before), ModelProfile.load(after), tolerance=tolerance)
    if json:
        print_document(found.to_json())
    else:
        print_diff(found)


@app.command("merge")
def merge(
    profiles: Annotated[list[Path], typer.Argument(metavar="PROFILE...", help="Profiles of one model on one device.")],
    output: Output = None,
    json: Json = False,
) -> None:
    """Unite the measured configurations of several profiles.

    Example: stagewright profile merge short.json long.json -o profile.json
    """
    from stagewright.planner.documents import ModelProfile
    from stagewright.profiler.profile_merge import merge_profiles

    _check_writable(output)
    document = merge_profiles([ModelProfile.load(path) for path in profiles])
    _deliver(document, output, json, print_profile)


@app.command("freeze")
def freeze(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="A profile or config.json, or a catalogue name.")],
    first: Annotated[int, typer.Option(help="Freeze this many layers from the first on.")] = 0,
    layer: Annotated[list[str] | None, typer.Option(help="Name of a layer to freeze; may repeat.")] = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Say which layers are no longer trained: they keep their weights, without gradients and optimizer state.

    Example: stagewright profile freeze vit-l-16 --first 12 -o frozen.json
    """
    from stagewright.cli.inputs import load_model
    from stagewright.planner.freezing import freeze as frozen
    from stagewright.planner.freezing import frozen_prefix

    _check_writable(output)
    if not first and not layer:
        raise InvalidArgument("no layer was named", field="layer", hint="give --first N or --layer NAME")
    document = load_model(profile)
    names = {*(layer or ()), *document.layer_names[:first]}
    _deliver(frozen(document, names) if layer else frozen_prefix(document, first), output, json, print_profile)


@app.command("calibrate")
def calibrate(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="The profile the plan was made from.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run.json of a run of the plan.")],
    plan: Annotated[Path | None, typer.Option(help="The plan that ran; plan.json beside the run unless told.")] = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Scale a profile's times to what a run measured.

    Example: stagewright profile calibrate out/profile.json out/run.json -o calibrated.json
    """
    from stagewright.planner.documents import ModelProfile, Plan
    from stagewright.planner.documents.document import read_json
    from stagewright.profiler.calibrate import calibrate as calibrated

    _check_writable(output)
    where = plan or run.with_name("plan.json")
    result = calibrated(ModelProfile.load(profile), Plan.load(where), read_json(run))
    if output is not None:
        result.profile.save(output)
    factors = {
        name: {"forward": result.forward_factors[name], "backward": result.backward_factors[name]}
        for name in sorted(result.forward_factors)
    }
    if json:
        errors = {"before": result.error_before, "after": result.error_after}
        print_document({"factors": factors, "error": errors, "profile": result.profile.model_dump(mode="json")})
        return
    screen = console()
    for name, value in factors.items():
        screen.print(f"{name}: forward x {value['forward']:.3f}, backward x {value['backward']:.3f}")
    screen.print(f"error of an action: {result.error_before:.1%} before, {result.error_after:.1%} after")


def default_cache() -> Path:
    """Return the folder where measurements are kept: under XDG_CACHE_HOME, or .cache in the home folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stagewright"


def print_profile(profile: ModelProfile) -> None:
    """Print one row for each class and configuration, then the pedigree and its warnings."""
    from rich.table import Table

    from stagewright.planner.documents import Recompute
    from stagewright.profiler.profile_html import relative_spread

    screen = console()
    pedigree = profile.pedigree
    screen.print(f"{profile.name}: {profile.num_layers} layers, {profile.num_parameters:,} parameters, {profile.dtype}")
    heads = (
        "class",
        "layers",
        "b x s / t",
        "forward",
        "input grad",
        "weight grad",
        "spread",
        "kept",
        "workspace",
        "optimizer",
    )
    table = Table(*heads, box=None)
    for name in dict.fromkeys(profile.layer_classes):
        value = profile.classes[name]
        for cost in value.costs:
            table.add_row(
                name,
                str(profile.layer_classes.count(name)),
                f"{cost.microbatch} x {cost.sequence_length} / {cost.tensor_degree}",
                seconds_text(cost.forward_s),
                seconds_text(cost.input_grad_s),
                seconds_text(cost.weight_grad_s),
                f"{relative_spread(cost):.1%}",
                bytes_text(cost.activation_bytes[Recompute.NONE]),
                bytes_text(cost.workspace_bytes),
                seconds_text(cost.optimizer_s),
            )
    screen.print(table)
    screen.print(
        f"beside the layers: {seconds_text(profile.action_overhead_s)} a forward or backward of a stage, "
        f"{seconds_text(profile.step_overhead_s)} a step"
    )
    load = f"{pedigree.num_busy_ranks} busy ranks x {pedigree.threads_per_rank} threads"
    screen.print(f"{pedigree.device or 'no device'}, {load}, taken {pedigree.taken_at or 'at no time'}")
    for warning in pedigree.warnings:
        screen.print(f"[yellow]warning:[/yellow] {warning}")


def print_network(cluster: Cluster) -> None:
    """Print devices and links."""
    screen = console()
    for group in cluster.groups:
        device = group.device
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in device.flops.items())
        screen.print(f"{group.num_devices} x {device.name}: {bytes_text(device.memory_bytes)}, {rates}")
        for level in group.links:
            screen.print(
                f"  {level.name}, {level.num_devices} devices: {seconds_text(level.latency_s)} + "
                f"bytes / {level.bytes_per_s / 1e9:.3g} GB/s, compute slows down by {level.overlap_slowdown:.2f} meanwhile"
            )
            for name, segments in level.collectives.items():
                last = segments[-1]
                screen.print(f"    {name}: {seconds_text(last.latency_s)} + bytes / {last.bytes_per_s / 1e9:.3g} GB/s")


def print_diff(found: ProfileDiff) -> None:
    """Print the differences for people."""
    screen = console()
    if not found.same_layers:
        screen.print("[yellow]the layers differ: these are not profiles of the same model[/yellow]")
    for name, (old, new) in {**found.surroundings, **found.versions}.items():
        screen.print(f"{name}: {old or 'none'} -> {new or 'none'}")
    for text, entries in (("only before", found.missing), ("only after", found.added)):
        for entry in entries:
            screen.print(f"{text}: {entry}")
    for change in found.changes:
        microbatch, sequence, degree = change.configuration
        what = f"{change.layer_class} {change.field} at {microbatch} x {sequence} / {degree}"
        shown = bytes_text if "bytes" in change.field else seconds_text
        screen.print(f"{what}: {shown(change.before)} -> {shown(change.after)} ({change.relative:+.1%})")
    if not found.changes:
        screen.print("no number changed beyond its spread")


def _measured_network(ranks: int | None, device: str, budget_s: float, report: ReportsProgress) -> Cluster | None:
    """Return the cluster of the job that torchrun started (None but on its first rank), or of this machine."""
    from stagewright.profiler.discover import discover_local
    from stagewright.profiler.network_groups import job_of, profile_job

    _choice(device, ("auto", "cpu", "cuda"), "device")
    job = job_of(os.environ)
    if job is not None:
        return profile_job(job, device=device, budget_s=budget_s, progress=report)
    return discover_local(max_devices=ranks, device=device, budget_s=budget_s, progress=report)  # type: ignore[arg-type]


def _network_from_logs(logs: Sequence[Path], cluster: str | None) -> Cluster:
    from stagewright.planner.catalog import resolve_cluster
    from stagewright.profiler.nccl_tests import apply_nccl_tests, read_nccl_tests

    if cluster is None:
        raise InvalidArgument(
            "--from needs the cluster that was measured", field="cluster", hint="for example --cluster h100-sxm:8x1"
        )
    return apply_nccl_tests(resolve_cluster(cluster), [read_nccl_tests(path) for path in logs])


def _deliver(document: Shown, output: Path | None, json: bool, show: Callable[[Shown], None]) -> None:
    """Write the document where it is wanted and print it, as JSON or for people."""
    if output is not None:
        document.save(output)
    if json:
        print_document(document.model_dump(mode="json"))
        return
    show(document)
    if output is not None:
        console().print(f"written to {output}")


def _numbers(text: str, field: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidArgument(
            f"--{field} {text!r} is not numbers separated by commas", field=field, hint=f"for example --{field} 1,2,4"
        ) from error


def _choice(text: str, known: Sequence[str], field: str) -> str:
    if text not in known:
        raise InvalidArgument(f"--{field} {text!r} is none of {', '.join(known)}", field=field)
    return text


def _check_writable(path: Path | None) -> None:
    """Refuse a path that cannot be written before an hour is spent on measuring."""
    if path is not None and not path.resolve().parent.is_dir():
        raise InvalidArgument(f"{path}: the folder {path.parent} does not exist", field="output")
