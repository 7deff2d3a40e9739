"""`stagewright plan`: find the best plan, with a proven bound."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, bytes_text, console, print_document, progress_bar, seconds_text
from stagewright.planner.errors import InvalidArgument

if TYPE_CHECKING:
    from stagewright.cli.output import ReportsProgress
    from stagewright.planner.documents import Cluster, ModelProfile, Plan, StagePlan, TrainingJob
    from stagewright.planner.documents.migration import Migration
    from stagewright.planner.documents.outcome import Diagnosis, FrontierPoint, PlanOutcome, Progress
    from stagewright.planner.search.reproof import Reproof

INFEASIBLE, NO_SOLUTION = 3, 4


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Profile or config.json by path, or a catalogue name.")],
    cluster: Annotated[
        str | None,
        typer.Option(
            help="File, catalogue name, DEVICE:PER_NODExNODES (joined by +), or `local`; that of --from unless told."
        ),
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Use at most this many of the cluster's devices.")] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Samples of one optimizer step; 256, or that of --from or --job, unless told.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a sample; the model's own unless told.")
    ] = None,
    job: Annotated[
        Path | None, typer.Option(help="A TrainingJob document; the other job options then override it.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp64, fp32, bf16, fp16 or fp8.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adam, sgd, sgd-momentum, muon or shampoo, with their usual bytes.")
    ] = None,
    planner: Annotated[str, typer.Option(help="Planner: exact, or a named one of the literature.")] = "exact",
    objective: Annotated[
        str | None, typer.Option(help="step-time, tokens-per-dollar, fewest-devices, min-max-memory, frontier.")
    ] = None,
    step_deadline: Annotated[
        float | None, typer.Option(help="Seconds a step may take: required of every plan, whatever the objective.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Dollars an hour for each device, in place of the cluster's own price.")
    ] = None,
    pin: Annotated[list[str] | None, typer.Option(help="NAME=VALUE the plan must have, e.g. tp=8; may repeat.")] = None,
    forbid: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME=VALUE the plan must not have; may repeat.")
    ] = None,
    tie: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=NAME of two degrees that must be equal, e.g. ep=dp, or of layers that must share a stage."
        ),
    ] = None,
    per_stage_degrees: Annotated[
        bool, typer.Option("--per-stage-degrees", help="Stages may differ in their degrees.")
    ] = False,
    target: Annotated[str | None, typer.Option(help="Search only what this format can express.")] = None,
    gap: Annotated[float | None, typer.Option(help="Gap to prove before stopping; 0 is the long run.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds until the best so far is the answer.")] = None,
    top: Annotated[int, typer.Option(help="How many alternatives to show.")] = 5,
    from_plan: Annotated[Path | None, typer.Option("--from", help="Replan: stay close to this plan.")] = None,
    executor: Annotated[str, typer.Option(help="inline, process or ray.")] = "inline",
    verify: Annotated[bool, typer.Option("--verify", help="Check the certificate independently.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here.")] = None,
    json: Json = False,
) -> None:
    """Find the best parallel training plan for a model on a cluster, with a proven bound.

    Example: stagewright plan llama2-13b --cluster a100-sxm-80g:8x8 --global-batch 1024 -o plan.json
    """
    from stagewright.cli.inputs import load_model
    from stagewright.planner.compiling import compiled_by_two
    from stagewright.planner.planning import make_plan

    if output is not None and not output.parent.is_dir():
        raise InvalidArgument(
            f"{output.parent} is not a folder", field="output", hint="give a path in a folder that exists"
        )
    with (
        progress_bar(quiet=json) as report,
        compiled_by_two(lambda done: report("compiling, once in an installation", done, 1)),
    ):
        profile = load_model(model)
        previous = None if from_plan is None else _load_plan(from_plan)
        machines = _priced(_machines(cluster, previous, report), price_per_hour)
        training_job = _job(
            _base_job(job, previous, profile, sequence_length),
            {
                "global_batch": global_batch,
                "sequence_length": sequence_length,
                "precision": precision,
                "optimizer": optimizer,
                "objective": objective,
                "step_deadline_s": step_deadline,
            },
            pin,
            forbid,
            tie,
            target,
            per_stage_degrees,
        )
        outcome = make_plan(
            profile,
            machines,
            training_job,
            planner=planner,
            num_devices=devices,
            top=top,
            gap=gap,
            deadline_s=deadline,
            executor=executor,
            previous=previous,
            progress=lambda state: report(state.phase, state.done, state.total, _known_text(state)),
        )
    reproof = None
    if verify and outcome.plan is not None:
        from stagewright.planner.search.verify import verify_certificate

        reproof = verify_certificate(outcome.plan, profile)
        sys.stderr.write("certificate verified: the plan was scored again and objective, bound and gap agree\n")
        sys.stderr.write(_reproof_text(reproof))
    if output is not None and outcome.plan is not None:
        outcome.plan.save(output)
    if json:
        verified = {} if reproof is None else {"verification": dataclasses.asdict(reproof)}
        print_document(outcome.model_dump(mode="json") | verified)
    else:
        print_outcome(outcome, output)
    if outcome.status == "infeasible":
        raise typer.Exit(INFEASIBLE)
    if outcome.status == "no_solution":
        raise typer.Exit(NO_SOLUTION)


def _reproof_text(reproof: Reproof | None) -> str:
    if reproof is None:
        return "the bound itself was not proved again: of a frontier, and of other planners, only the plan is checked\n"
    return (
        f"{reproof.candidates} candidates enumerated anew: {reproof.reproved} proved again by arithmetic, "
        f"{reproof.programs} rest on linear programs, {reproof.attacked} of these completed and simulated "
        "without coming below the bound\n"
    )


def profile_sequence(profile: ModelProfile, told: int | None) -> int:
    """Return the sequence length to plan for: the one told, the longest measured one, or the architecture's."""
    if told is not None:
        return told
    measured = {cost.sequence_length for layer_class in profile.classes.values() for cost in layer_class.costs}
    if measured:
        return max(measured)
    if profile.architecture is not None and profile.architecture.max_sequence_length:
        return profile.architecture.max_sequence_length
    raise InvalidArgument(
        "the model does not say its sequence length", field="sequence_length", hint="give --sequence-length"
    )


def _known_text(state: Progress) -> str:
    """Return the best step so far, its bound and the gap between them, as far as they are known."""
    best = "" if state.incumbent_s is None else f"best {seconds_text(state.incumbent_s)}"
    bound = "" if not state.bound_s or state.bound_s == float("inf") else f"bound {seconds_text(state.bound_s)}"
    gap = "" if state.gap is None or not bound else f"gap {state.gap:.2%}"
    return ", ".join(text for text in (best, bound, gap) if text)


def _machines(text: str | None, previous: Plan | None, report: ReportsProgress) -> Cluster:
    """Return the cluster that was named, or that of the plan to follow."""
    from stagewright.cli.inputs import load_cluster

    if text is not None:
        return load_cluster(text, report)
    if previous is None:
        raise InvalidArgument(
            "the cluster is missing",
            field="cluster",
            hint="give --cluster, e.g. a100-sxm-80g:8x8, or --from with a plan",
        )
    return previous.cluster


def _base_job(
    path: Path | None, previous: Plan | None, profile: ModelProfile, sequence_length: int | None
) -> dict[str, object]:
    """Return the job before the other options change it: a document, that of the plan to follow, or the defaults."""
    from stagewright.planner.documents import TrainingJob
    from stagewright.planner.documents.document import read_json

    if path is not None:
        return TrainingJob.from_object(read_json(path), source=str(path)).model_dump(mode="json")
    if previous is not None:
        return previous.job.model_dump(mode="json")
    return {"global_batch": 256, "sequence_length": profile_sequence(profile, sequence_length)}


def _job(
    base: dict[str, object],
    changes: Mapping[str, str | float | None],
    pin: list[str] | None,
    forbid: list[str] | None,
    tie: list[str] | None,
    target: str | None,
    per_stage_degrees: bool,
) -> TrainingJob:
    from stagewright.cli.inputs import parse_forbids, parse_pins, parse_ties
    from stagewright.planner.documents import Optimizer, TrainingJob

    space = dict(base.get("space") or {})  # type: ignore[call-overload]
    if pin:
        space["pins"] = parse_pins(pin).model_dump(mode="json")
    if forbid:
        space["forbids"] = [item.model_dump(mode="json") for item in parse_forbids(forbid)]
    if tie:
        space["equal"], space["ties"] = parse_ties(tie)
    if per_stage_degrees:
        space["per_stage_degrees"] = True
    if target is not None:
        space["target"] = target
    told = base | {key: value for key, value in changes.items() if value is not None} | {"space": space}
    if changes["optimizer"] is not None:
        precision = str(told.get("precision", "bf16"))
        told["optimizer"] = Optimizer.standard(changes["optimizer"], precision).model_dump(mode="json")  # type: ignore[arg-type]
    return TrainingJob.from_object(told)


def _priced(machines: Cluster, price_per_hour: float | None) -> Cluster:
    """Return the cluster with every device at this price, or as it is."""
    if price_per_hour is None:
        return machines
    if not 0 < price_per_hour < float("inf"):
        raise InvalidArgument(
            f"--price-per-hour is {price_per_hour}, a price is above 0",
            field="price_per_hour",
            hint="give dollars an hour",
        )
    groups = tuple(
        group.model_copy(update={"device": group.device.model_copy(update={"price_per_hour": price_per_hour})})
        for group in machines.groups
    )
    return machines.model_copy(update={"groups": groups})


def _load_plan(path: Path) -> Plan:
    from stagewright.planner.documents import Plan

    return Plan.load(path)


def print_outcome(outcome: PlanOutcome, output: Path | None = None) -> None:
    """Print an outcome for people: the plan as a table, how good it is proved to be, and what to do next."""
    screen = console()
    if outcome.plan is None:
        if outcome.diagnosis is None:
            screen.print("No plan was found before the limit; give a longer --deadline.")
        else:
            print_diagnosis(outcome.diagnosis)
        return
    print_plan(outcome.plan)
    found = outcome.plan
    proof = {
        "optimal": "optimal (proved)",
        "within_gap": f"within {outcome.gap:.2%} of the proven bound" if outcome.gap is not None else "within the gap",
        "feasible": f"feasible, gap {outcome.gap:.2%}" if outcome.gap is not None else "feasible, nothing proved",
    }[outcome.status]
    screen.print(
        f"{proof}{_bound_text(outcome)}; {outcome.candidates} candidates, {outcome.simulated} simulated, {outcome.wall_s:.2f} s",
    )
    if outcome.frontier:
        _print_frontier(outcome.frontier)
    for rank, other in enumerate(outcome.alternatives, start=2):
        peak = bytes_text(other.peak_memory_bytes)
        screen.print(f"  {rank}. {other.summary}: {seconds_text(other.step_time_s)}, {peak}")
    if outcome.migration is not None:
        _print_migration(outcome.migration)
    if output is not None:
        sys.stderr.write(f"wrote {output} ({found.digest[:19]})\n")


def _bound_text(outcome: PlanOutcome) -> str:
    """Return the objective, where it is not the step, and its bound."""
    if outcome.bound is None or outcome.objective is None:
        return ""
    if outcome.objective_name in ("step_time_s", "frontier"):
        return f", bound {seconds_text(outcome.bound)}"
    words = outcome.objective_name.removesuffix("_bytes").replace("_", " ")
    shown = bytes_text if outcome.objective_name == "peak_memory_bytes" else _whole_text
    return f", {words} {shown(outcome.objective)}, bound {shown(outcome.bound)}"


def _whole_text(value: float) -> str:
    return f"{value:,.0f}"


def _print_migration(moves: Migration) -> None:
    devices = {move.target for move in moves.moves}
    restored = f", {bytes_text(moves.restored_bytes)} restored from a checkpoint" if moves.restored_bytes else ""
    console().print(
        f"from the running plan ({seconds_text(moves.previous_step_time_s)} a step): {bytes_text(moves.kept_bytes)} stay, "
        f"{bytes_text(moves.moved_bytes)} move to {len(devices)} devices in {seconds_text(moves.seconds)}{restored}; "
        f"--json lists all {len(moves.moves)} moves by layer"
    )


def _print_frontier(points: Sequence[FrontierPoint]) -> None:
    from rich.table import Table

    from stagewright.planner.plan_summary import plan_summary

    table = Table("devices", "step", "peak memory", "plan", box=None)
    for point in points:
        step, peak = seconds_text(point.step_time_s), bytes_text(point.peak_memory_bytes)
        table.add_row(str(point.num_devices), step, peak, plan_summary(point.plan))
    console().print(table)


def print_plan(found: Plan) -> None:
    """Print a plan for people: headline and one row for each pipeline rank."""
    from rich.table import Table

    screen = console()
    prediction, spec = found.prediction, found.schedule
    screen.print(
        f"[bold]{found.model}[/bold] on {found.num_devices} devices of {found.cluster.name}: "
        f"{spec.name}, {spec.num_ranks} pipeline ranks x {spec.num_chunks} chunks, {spec.num_microbatches} microbatches of {spec.microbatch}"
    )
    mfu = "" if prediction.mfu is None else f", MFU {prediction.mfu:.1%}"
    screen.print(
        f"step {seconds_text(prediction.step_time_s)}, {prediction.tokens_per_s:,.0f} tokens/s{mfu}, "
        f"bubble {prediction.bubble_over_total:.1%} ({prediction.source})"
    )
    expected = prediction.expectation
    if expected is not None and expected.step_time_s != prediction.step_time_s:
        screen.print(
            f"a run should take {seconds_text(expected.step_time_s)} a step: messages take {seconds_text(expected.message_s)} "
            f"of it from the processors, jitter {seconds_text(expected.jitter_s)}"
        )
    own = [name for name, shown in _OWN_COLUMNS.items() if any(map(shown, found.stages))]
    table = Table("rank", "layers", "dp", "tp", "cp", "ep", "zero", "recompute", *own, "peak memory", box=None)
    for rank in range(spec.num_ranks):
        every = [stage for stage, where in zip(found.stages, spec.placement[0], strict=True) if where == rank]
        for place, (degrees, alike) in enumerate(groupby(every, key=lambda stage: stage.degrees)):
            held = list(alike)
            levels = [level for stage in held for level in stage.recompute_levels()]
            counts = ", ".join(f"{levels.count(level)} {level.value}" for level in sorted(set(levels)))
            table.add_row(
                "" if place else str(rank),
                " + ".join(str(stage.num_layers) for stage in held),
                *(str(getattr(degrees, name)) for name in ("dp", "tp", "cp", "ep", "zero")),
                counts,
                *(_OWN_COLUMNS[name](held[0]) for name in own),
                "" if place else bytes_text(prediction.peak_memory_bytes[rank]),
            )
    screen.print(table)


def _offload_text(stage: StagePlan) -> str:
    return f"{stage.optimizer_offload:.0%} of the optimizer" if stage.optimizer_offload else ""


def _shares_text(stage: StagePlan) -> str:
    return ", ".join(f"{len(list(run))} x {share}" for share, run in groupby(stage.batch_shares))


# Columns that only plans with something in them have.
_OWN_COLUMNS: dict[str, Callable[[StagePlan], str]] = {"on the host": _offload_text, "shares": _shares_text}


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print for people why nothing fits, what is short, and what would fit."""
    screen = console()
    screen.print(f"Infeasible: {diagnosis.message}")
    for shortfall in diagnosis.shortfalls:
        items = ", ".join(
            f"{name} {bytes_text(value)}" for name, value in shortfall.items.model_dump().items() if value
        )
        screen.print(
            f"  pipeline rank {shortfall.pipeline_rank} needs {bytes_text(shortfall.needed_bytes)}, has "
            f"{bytes_text(shortfall.available_bytes)}, short of {bytes_text(shortfall.short_bytes)}: {items}"
        )
    for relaxation in diagnosis.relaxations:
        step = "" if relaxation.step_time_s is None else f" (a step of {seconds_text(relaxation.step_time_s)} or less)"
        screen.print(f"  would fit with: {relaxation.change}{step}")
