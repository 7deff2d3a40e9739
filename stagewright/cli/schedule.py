"""`stagewright schedule`: generate or search a pipeline schedule, simulate it, draw it; and list the known ones."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, console, print_document, progress_bar, seconds_text
from stagewright.planner.errors import Infeasible, InvalidArgument, InvalidDocument

if TYPE_CHECKING:
    from stagewright.planner.schedules.action import Kind
    from stagewright.planner.schedules.auto import Effort, PlacementChoice
    from stagewright.planner.schedules.costs import StageCosts
    from stagewright.planner.schedules.family import ScheduleRequest
    from stagewright.planner.schedules.report import ScheduleReport
    from stagewright.planner.schedules.schedule import Schedule

INFEASIBLE = 3
_COST_KEYS = ("forward_s", "input_grad_s", "weight_grad_s", "activation", "recompute_s")
_STYLES = {"F": "black on blue", "B": "black on green", "I": "black on cyan", "W": "black on yellow"}


def schedule(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A schedule's name, `auto` to search, `list` to list all.")
    ],
    ranks: Annotated[int | None, typer.Option(help="Pipeline depth D.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Microbatches T of one step.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Virtual stages on each rank.")] = None,
    slices: Annotated[int, typer.Option(help="Sequence slices of a microbatch.")] = 1,
    waves: Annotated[int | None, typer.Option(help="Waves of `wave`: twice as many chunks.")] = None,
    forward_s: Annotated[float | None, typer.Option(help="Forward of one rank's share; 1 unless told.")] = None,
    input_grad_s: Annotated[float | None, typer.Option(help="Input gradient of one rank's share; 1.")] = None,
    weight_grad_s: Annotated[float | None, typer.Option(help="Weight gradient of one rank's share; 1.")] = None,
    latency_s: Annotated[float, typer.Option(help="One hop between two ranks.")] = 0.0,
    memory_cap: Annotated[
        float | None, typer.Option(help="Most live activations of a rank, in rank-microbatches, freed at W.")
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="JSON list, one entry for each virtual stage; excludes the three cost options.")
    ] = None,
    placement: Annotated[
        str,
        typer.Option(help="loop, v, wave or any; auto: operators too, every map of a few --costs entries to ranks."),
    ] = "any",
    copies: Annotated[
        int | None,
        typer.Option(help="Most copies of its weights on a rank, 1 or 2; 2 unless --csv is given, which knows one."),
    ] = None,
    effort: Annotated[str, typer.Option(help="Budget of `auto`: low, normal or high.")] = "normal",
    deadline: Annotated[float | None, typer.Option(help="Seconds after which `auto` stops early.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of `auto`.")] = 0,
    parameter: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for the schedule's own parameters; may repeat.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the simulated schedule here.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace here (opens in Perfetto).")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write torch's pipelining CSV here.")] = None,
    lowered: Annotated[
        bool, typer.Option("--lowered", help="Write the CSV with sends, receives and gradient reductions.")
    ] = False,
    json: Json = False,
) -> None:
    """Generate a pipeline schedule, simulate one step of it, and print its times, bubbles and peaks.

    Examples: stagewright schedule zb-v --ranks 4 --microbatches 8;
    stagewright schedule auto --ranks 4 --microbatches 8 --memory-cap 4 --svg auto.svg; stagewright schedule list
    """
    if name == "list":
        _list(as_json=json)
        return
    from stagewright.planner.schedules.report import infeasible_document, report

    request = _request(
        name,
        ranks=_required("ranks", ranks),
        microbatches=_required("microbatches", microbatches),
        chunks=chunks,
        slices=slices,
        waves=waves,
        times=(forward_s, input_grad_s, weight_grad_s),
        latency_s=latency_s,
        memory_cap=memory_cap,
        costs=costs,
        are_operators=placement == "operators",
        parameters=_parameters(parameter or []),
    )
    options = _search_options(placement, effort, deadline, seed)
    try:
        with progress_bar(quiet=json) as progress:
            found = report(
                name,
                request,
                effort=options[1],
                placement=options[0],
                copies=_most_copies(name, copies, has_csv=csv is not None),
                seed=seed,
                deadline_s=deadline,
                progress=lambda best_s, bound_s: progress("searching", round(1e6 * bound_s / best_s), 1_000_000),
            )
    except Infeasible as error:
        if json:
            print_document(infeasible_document(name, request, error))
        sys.stderr.write(f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        raise typer.Exit(INFEASIBLE) from error
    _write_files(found, svg=svg, trace=trace, csv=csv, lowered=lowered)
    if json:
        print_document(found.document())
    else:
        _print(found)


def _required(name: str, value: int | None) -> int:
    if value is None:
        raise InvalidArgument(f"--{name} is missing", field=name, hint=f"give --{name} N")
    if value < 1:
        raise InvalidArgument(f"--{name} is {value}, it must be at least 1", field=name)
    return value


def _request(
    name: str,
    *,
    ranks: int,
    microbatches: int,
    chunks: int | None,
    slices: int,
    waves: int | None,
    times: tuple[float | None, float | None, float | None],
    latency_s: float,
    memory_cap: float | None,
    costs: Path | None,
    are_operators: bool,
    parameters: dict[str, int | float | str],
) -> ScheduleRequest:
    from stagewright.planner.schedules.family import ScheduleRequest

    _require_number("latency_s", latency_s, least=0.0)
    if memory_cap is not None and not memory_cap > 0:
        raise InvalidArgument(f"--memory-cap is {memory_cap:g}, it must be above 0", field="memory_cap")
    for field, value in (("chunks", chunks), ("slices", slices), ("waves", waves)):
        if value is not None and value < 1:
            raise InvalidArgument(f"--{field} is {value}, it must be at least 1", field=field)
    if costs is not None:
        given = [
            f"--{key.replace('_', '-')}" for key, value in zip(_COST_KEYS, times, strict=False) if value is not None
        ]
        if given:
            raise InvalidArgument(
                f"--costs {costs} and {given[0]} both say what stages cost", field="costs", hint=f"leave {given[0]} out"
            )
        stage_costs = _read_costs(costs, ranks, are_operators=are_operators)
        per_rank = stage_costs.num_stages // ranks
        if chunks is None and waves is None and per_rank > 1 and not are_operators:
            chunks, waves = (None, per_rank // 2) if _is_wave(name) else (per_rank, None)
    else:
        stage_costs = _equal_costs(name, ranks, chunks, waves, times)
    return ScheduleRequest(
        ranks,
        microbatches,
        num_chunks=chunks,
        num_slices=slices,
        num_waves=waves,
        costs=stage_costs,
        latency_s=latency_s,
        memory_cap=memory_cap,
        parameters=parameters,
    )


def _is_wave(name: str) -> bool:
    return name != "auto" and _family_name(name) == "wave"


def _family_name(name: str) -> str:
    from stagewright.planner.schedules.registry import family

    return family(name).name


def _equal_costs(
    name: str, ranks: int, chunks: int | None, waves: int | None, times: tuple[float | None, float | None, float | None]
) -> StageCosts:
    """Return equal stages for the cost options, which are one rank's whole share."""
    from stagewright.planner.schedules.costs import StageCosts
    from stagewright.planner.schedules.registry import family

    forward_s, input_grad_s, weight_grad_s = (1.0 if value is None else value for value in times)
    for field, value in zip(_COST_KEYS, (forward_s, input_grad_s, weight_grad_s), strict=False):
        _require_number(field, value, above=0.0)
    row = None if name.strip().lower() == "auto" else family(name)
    per_rank = 1 if row is None else chunks or (2 * waves if waves else row.default_chunks)
    equal = StageCosts.uniform(
        ranks * per_rank,
        forward_s=forward_s,
        input_grad_s=input_grad_s,
        weight_grad_s=weight_grad_s,
        num_chunks=per_rank,
    )
    return equal if row is None or row.expanded_costs is None else row.expanded_costs(equal)


def _require_number(field: str, value: float, *, least: float | None = None, above: float | None = None) -> None:
    good = math.isfinite(value) and (least is None or value >= least) and (above is None or value > above)
    if not good:
        rule = f"at least {least:g}" if least is not None else f"above {above:g}"
        option = field.replace("_", "-")
        raise InvalidArgument(f"--{option} is {value:g}, it must be a finite number {rule}", field=field)


def _read_costs(path: Path, ranks: int, *, are_operators: bool) -> StageCosts:
    """Return the costs of a file, activations in rank-microbatches: an entry's 1 is an equal share of its rank's.

    Operators may be of any number, since each rank takes as many as it likes.
    """
    from stagewright.planner.documents.document import read_json
    from stagewright.planner.schedules.costs import StageCosts

    document = read_json(path)
    if not isinstance(document, list) or not document:
        raise InvalidDocument(
            f"{path}: the costs are a list with an entry for each virtual stage", field="costs", hint=_EXAMPLE
        )
    entries = [_cost_entry(path, index, entry) for index, entry in enumerate(document)]
    if len(entries) % ranks and not are_operators:
        raise InvalidDocument(
            f"{path}: {len(entries)} entries are not a multiple of {ranks} ranks",
            field="costs",
            hint="give one entry for each virtual stage, in model order",
        )
    columns = {key: [entry[key] for entry in entries] for key in _COST_KEYS}
    chunks = len(entries) / ranks
    columns["activation"] = [value / chunks for value in columns["activation"]]
    try:
        return StageCosts.of(
            columns["forward_s"],
            columns["input_grad_s"],
            columns["weight_grad_s"],
            activation=columns["activation"],
            recompute_s=columns["recompute_s"],
        )
    except InvalidArgument as error:
        raise InvalidDocument(f"{path}: {error.message}", field=f"costs.{error.field}", hint=error.hint) from error


_EXAMPLE = (
    'an entry reads {"forward_s": 1.0, "input_grad_s": 1.1, "weight_grad_s": 0.9, "activation": 1, "recompute_s": 0}'
)


def _cost_entry(path: Path, index: int, entry: object) -> dict[str, float]:
    if not isinstance(entry, dict):
        raise InvalidDocument(f"{path}: entry {index} is not an object", field=f"costs[{index}]", hint=_EXAMPLE)
    unknown = sorted(set(entry) - set(_COST_KEYS))
    if unknown:
        raise InvalidDocument(
            f"{path}: entry {index} has the unknown key {unknown[0]!r}",
            field=f"costs[{index}].{unknown[0]}",
            hint=_EXAMPLE,
        )
    values = {"activation": 1.0, "recompute_s": 0.0} | entry
    for key in _COST_KEYS:
        if key not in values:
            raise InvalidDocument(f"{path}: entry {index} lacks {key!r}", field=f"costs[{index}].{key}", hint=_EXAMPLE)
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidDocument(
                f"{path}: entry {index} has {key} = {value!r}, which is not a finite number",
                field=f"costs[{index}].{key}",
                hint=_EXAMPLE,
            )
    return {key: float(values[key]) for key in _COST_KEYS}


def _parameters(texts: list[str]) -> dict[str, int | float | str]:
    parameters: dict[str, int | float | str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise InvalidArgument(f"--set {text!r} is not KEY=VALUE", field="set")
        parameters[key.strip()] = _parsed(value.strip())
    return parameters


def _parsed(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _search_options(placement: str, effort: str, deadline: float | None, seed: int) -> tuple[PlacementChoice, Effort]:
    from stagewright.planner.schedules.auto import Effort, PlacementChoice

    if placement not in set(PlacementChoice):
        names = ", ".join(PlacementChoice)
        raise InvalidArgument(f"--placement {placement!r} is unknown", field="placement", hint=f"take one of {names}")
    if effort not in set(Effort):
        raise InvalidArgument(
            f"--effort {effort!r} is unknown", field="effort", hint=f"take one of {', '.join(Effort)}"
        )
    if deadline is not None:
        _require_number("deadline", deadline, above=0.0)
    if seed < 0:
        raise InvalidArgument(f"--seed is {seed}, it must be at least 0", field="seed")
    return PlacementChoice(placement), Effort(effort)


def _most_copies(name: str, copies: int | None, *, has_csv: bool) -> int:
    from stagewright.planner.schedules.auto.request import MOST_COPIES
    from stagewright.planner.schedules.report import AUTO

    if copies is None:
        return 1 if has_csv and name.strip().lower() == AUTO else MOST_COPIES
    if not 1 <= copies <= MOST_COPIES:
        raise InvalidArgument(f"--copies is {copies}, a rank holds 1 or {MOST_COPIES}", field="copies")
    return copies


def _write_files(
    found: ScheduleReport, *, svg: Path | None, trace: Path | None, csv: Path | None, lowered: bool
) -> None:
    import json as json_text

    from stagewright.planner.documents.document import write_text

    texts: list[tuple[Path, str]] = []
    if svg is not None:
        from stagewright.formats.schedule_svg import schedule_svg

        sizes = f"{found.schedule.num_ranks} ranks, {found.schedule.num_microbatches} microbatches"
        texts.append((svg, schedule_svg(found.timeline, title=f"{found.schedule.name}: {sizes}")))
    if trace is not None:
        from stagewright.formats.chrome_trace import chrome_trace

        texts.append((trace, json_text.dumps(chrome_trace(found.timeline, name=found.schedule.name), allow_nan=False)))
    if csv is not None:
        texts.append((csv, _csv(found, lowered=lowered)))
    for path, text in texts:
        write_text(path, text)
        sys.stderr.write(f"wrote {path}\n")


def _csv(found: ScheduleReport, *, lowered: bool) -> str:
    from stagewright.formats.torch_csv import torch_csv
    from stagewright.planner.schedules.lowering import lower

    if not lowered:
        return torch_csv(found.schedule)
    executable: Schedule = lower(found.schedule, found.costs, data_parallel=True, merge="none", optimizer=False)
    return torch_csv(executable, csv_format="compute_comms")


def _print(found: ScheduleReport) -> None:
    from rich.table import Table

    from stagewright.planner.schedules.report import AUTO

    screen = console()
    timeline, document = found.timeline, found.document()
    schedule = found.schedule
    screen.print(
        f"[bold]{schedule.name}[/bold] on {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches: "
        f"{seconds_text(timeline.makespan_s)} (bound {seconds_text(found.bound_s)}), "
        f"{timeline.bubble_over_total:.2%} of all rank time idle"
    )
    if schedule.name == AUTO and found.auto is not None:
        named = found.auto.gain
        best = "" if named is None else f"; best named schedule: {named.name}, {seconds_text(named.named_s)}"
        screen.print(f"{found.auto.placement} placement, {found.auto.num_chunks} chunks, {found.auto.stop.value}{best}")
        if found.auto.num_copies > 1:
            one = found.auto.one_copy
            screen.print(
                f"[bold]each rank holds {found.auto.num_copies} copies of its weights and gradients[/bold], one stage of each; "
                f"with one copy (--copies 1): {seconds_text(one.makespan_s)} (bound {seconds_text(one.bound_s)})"
            )
    table = Table("measure", "value", "meaning", box=None)
    for key, text, meaning in (
        ("ideal_s", seconds_text(timeline.ideal_s), "mean work of a rank"),
        ("makespan_s", seconds_text(timeline.makespan_s), "first start to last end"),
        ("longest_span_s", seconds_text(timeline.longest_span_s), "longest first start to last end of one rank"),
        ("bubble_over_total", f"{timeline.bubble_over_total:.4f}", "1 - ideal / makespan"),
        ("bubble_over_ideal", f"{timeline.bubble_over_ideal:.4f}", "makespan / ideal - 1"),
        ("span_bubble_over_total", f"{timeline.span_bubble_over_total:.4f}", "1 - ideal / longest span"),
        ("peak_activations", _numbers(document["peak_activations"]), "by rank, in microbatches of a rank"),
        ("weight_versions", _numbers(document["weight_versions"]), "by rank, in weights of a rank"),
        ("num_messages", str(document["num_messages"]), "between ranks, both ways"),
        ("bound_s", seconds_text(found.bound_s), "no order of this work on these ranks is faster"),
    ):
        table.add_row(key, text, meaning)
    screen.print(table)
    _print_grid(found)


def _numbers(values: object) -> str:
    assert isinstance(values, list)
    shown = " ".join(f"{value:g}" for value in values[:32])
    return shown + (" ..." if len(values) > 32 else "")


def _print_grid(found: ScheduleReport) -> None:
    """Draw the timeline as text when it fits the screen."""
    from rich.text import Text

    from stagewright.planner.simulation.text_grid import draw_timeline

    screen = console()
    if found.schedule.num_ranks > 32:
        return
    lines = draw_timeline(found.timeline, most_columns=max(screen.width - 12, 20))
    for rank, pieces in enumerate(lines or []):
        line = Text(f"rank {rank:>2} |")
        for text, kind in pieces:
            line.append(text, style=_style(kind))
        screen.print(line, no_wrap=True, crop=True)


def _style(kind: Kind | None) -> str:
    return "" if kind is None else _STYLES.get(kind.name, "black on white")


def _list(*, as_json: bool) -> None:
    from stagewright.planner.schedules.registry import families

    rows = [
        {
            "name": row.name,
            "aliases": list(row.aliases),
            "synchronous": row.synchronous,
            "split_backward": row.split_backward,
            "num_replicas": row.num_replicas,
            "default_chunks": row.default_chunks,
            "weight_policy": row.weight_policy.value,
            "constraint": row.constraint,
            "paper": row.paper,
        }
        for row in families()
    ]
    if as_json:
        print_document([dict(row) for row in rows])
        return
    from rich.table import Table

    table = Table("name", "also", "sync", "I/W", "replicas", "chunks", "weights", "sizes", box=None)
    for row in families():
        table.add_row(
            row.name,
            ", ".join(row.aliases),
            "yes" if row.synchronous else "no",
            "split" if row.split_backward else "",
            str(row.num_replicas),
            str(row.default_chunks),
            row.weight_policy.value,
            row.constraint or "any",
        )
    table.add_row("auto", "", "yes", "split", "1 or 2", "1 to 4", "flush", "searches all orders under a memory cap")
    console().print(table)
