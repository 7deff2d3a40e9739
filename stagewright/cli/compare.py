"""`stagewright compare`: plans, or planners on one problem, side by side under the common simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, bytes_text, console, print_document, progress_bar, seconds_text
from stagewright.planner.errors import InvalidArgument, StagewrightError

if TYPE_CHECKING:
    from stagewright.planner.documents import Plan
    from stagewright.planner.documents.outcome import PlanOutcome

DRIFT = 6


def compare(
    inputs: Annotated[list[str], typer.Argument(metavar="PLAN|MODEL ...", help="Plans, or one model with --cluster.")],
    planners: Annotated[str, typer.Option(help="all, or names joined by commas, given a model.")] = "all",
    cluster: Annotated[str | None, typer.Option(help="Cluster, given a model.")] = None,
    global_batch: Annotated[int, typer.Option(help="Samples of one step, given a model.")] = 256,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a sample, given a model.")] = None,
    deadline: Annotated[float, typer.Option(help="Seconds for each planner.")] = 60.0,
    fail_over: Annotated[
        float | None, typer.Option(help="Exit 6 when a later plan is slower than the first by more percent.")
    ] = None,
    json: Json = False,
) -> None:
    """Put plans side by side, or all named planners on one model and cluster, scored by the common simulator.

    A planner's own objective is what it minimised; step, peak memory and the gap to the bound that the exact planner
    proved are the common simulator's. A planner that refuses the problem says why and the others go on.

    Example: stagewright compare gpt2 --cluster a100-sxm-80g:8x1 --planners exact,megatron
    """
    if len(inputs) == 1 and (cluster is not None or not Path(inputs[0]).name.endswith(".json")):
        rows = _planner_rows(inputs[0], planners, cluster, global_batch, sequence_length, deadline, quiet=json)
    else:
        rows = [_plan_row(Path(path)) for path in inputs]
    if json:
        print_document({"rows": rows})
    else:
        _print(rows)
    if fail_over is not None:
        _check_drift(rows, fail_over)


def _planner_rows(
    model: str,
    planners: str,
    cluster: str | None,
    global_batch: int,
    sequence_length: int | None,
    deadline: float,
    *,
    quiet: bool,
) -> list[dict[str, object]]:
    from stagewright.cli.inputs import load_cluster, load_model
    from stagewright.cli.plan import profile_sequence
    from stagewright.planner.documents import TrainingJob
    from stagewright.planner.planners.registry import planner as named_planner
    from stagewright.planner.planners.registry import planners as all_planners
    from stagewright.planner.planning import make_plan

    if cluster is None:
        raise InvalidArgument(
            "a model is compared on a cluster", field="cluster", hint="give --cluster, e.g. a100-sxm-80g:8x1"
        )
    names = (
        [row.name for row in all_planners()] if planners == "all" else [name.strip() for name in planners.split(",")]
    )
    rows: list[dict[str, object]] = []
    with progress_bar(quiet=quiet) as report:
        profile, machines = load_model(model), load_cluster(cluster, report)
        job = TrainingJob(global_batch=global_batch, sequence_length=profile_sequence(profile, sequence_length))
        bound_s: float | None = None
        for index, row in enumerate([named_planner(name) for name in names]):
            report("planners", index, len(names))
            try:
                outcome = make_plan(profile, machines, job, planner=row.name, deadline_s=deadline, top=0)
            except StagewrightError as error:
                rows.append({"name": row.name, "status": error.kind, "message": error.message})
                continue
            bound_s = outcome.bound_s if outcome.bound_s is not None else bound_s
            rows.append(_outcome_row(row.name, row.objective, outcome))
        report("planners", len(names), len(names))
    return [
        {**row, "gap": float(str(row["step_time_s"])) / bound_s - 1.0} if bound_s and "step_time_s" in row else row
        for row in rows
    ]


def _outcome_row(name: str, objective: str, outcome: PlanOutcome) -> dict[str, object]:
    row: dict[str, object] = {"name": name, "status": outcome.status, "wall_s": outcome.wall_s, "objective": objective}
    if outcome.plan is None:
        message = "nothing it chose fits the devices" if outcome.status == "no_solution" else "nothing fits"
        return row | {"message": message}
    return row | {"own_objective": outcome.own_objective} | _numbers(outcome.plan)


def _plan_row(path: Path) -> dict[str, object]:
    from stagewright.cli.simulate import find_profile
    from stagewright.planner.documents import Plan
    from stagewright.planner.prediction import with_prediction

    plan = Plan.load(path)
    return {"name": str(path), "status": "plan", **_numbers(with_prediction(plan, find_profile(plan, path)))}


def _numbers(plan: Plan) -> dict[str, object]:
    prediction, spec, degrees = plan.prediction, plan.schedule, plan.stages[0].degrees
    return {
        "step_time_s": prediction.step_time_s,
        "peak_memory_bytes": max(prediction.peak_memory_bytes),
        "mfu": prediction.mfu,
        "bubble_over_total": prediction.bubble_over_total,
        "plan": f"{spec.name} pp={spec.num_ranks} v={spec.num_chunks} dp={degrees.dp} tp={degrees.tp} cp={degrees.cp} "
        f"ep={degrees.ep} zero={degrees.zero} microbatch={spec.microbatch}",
    }


def _print(rows: list[dict[str, object]]) -> None:
    from rich.table import Table

    steps = [float(str(row["step_time_s"])) for row in rows if "step_time_s" in row]
    best = min(steps, default=0.0)
    table = Table(
        "",
        "status",
        "own objective",
        "step",
        "over best",
        "over bound",
        "peak memory",
        "MFU",
        "solved in",
        "plan",
        box=None,
    )
    for row in rows:
        if "step_time_s" not in row:
            table.add_row(str(row["name"]), str(row["status"]), *[""] * 7, str(row.get("message", "")))
            continue
        step = float(str(row["step_time_s"]))
        table.add_row(
            str(row["name"]),
            str(row["status"]),
            _own(row),
            seconds_text(step),
            f"{step / best - 1:+.1%}",
            _percent(row.get("gap"), "+.1%"),
            bytes_text(float(str(row["peak_memory_bytes"]))),
            _percent(row["mfu"], ".1%"),
            seconds_text(float(str(row["wall_s"]))) if "wall_s" in row else "",
            str(row["plan"]),
        )
    console().print(table)


def _percent(value: object, form: str) -> str:
    return "" if value is None else format(float(str(value)), form)


def _own(row: dict[str, object]) -> str:
    value = row.get("own_objective")
    if value is None:
        return ""
    return bytes_text(float(str(value))) if "bytes" in str(row["objective"]) else f"{float(str(value)):.4g} s"


def _check_drift(rows: list[dict[str, object]], percent: float) -> None:
    steps = [(str(row["name"]), float(str(row["step_time_s"]))) for row in rows if "step_time_s" in row]
    for name, step in steps[1:]:
        drift = (step / steps[0][1] - 1) * 100
        if drift > percent:
            typer.echo(f"{name} is {drift:.2f} % slower than {steps[0][0]}, more than {percent:g} %", err=True)
            raise typer.Exit(DRIFT)
