"""`stagewright explain`: what binds a plan, what came behind it, and why not another choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, bytes_text, console, print_document, progress_bar, seconds_text

if TYPE_CHECKING:
    from stagewright.planner.documents.explanation import Explanation, PathShares, WhyNot

_PARTS = ("compute", "bubble", "communication", "reduction", "overhead")


def explain(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan document.")],
    why_not: Annotated[
        list[str] | None, typer.Option(help="Choices to try instead, e.g. tp=4,pp=8; may repeat.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Its profile; profile.json beside it or the catalogue's unless told.")
    ] = None,
    runners_up: Annotated[
        int,
        typer.Option(min=0, max=100, help="Plans to show behind it; 0 leaves out the search, and what memory costs."),
    ] = 3,
    gap: Annotated[float | None, typer.Option(help="Gap to prove in each search; the job's own unless told.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds for each search.")] = None,
    json: Json = False,
) -> None:
    """Explain a plan: the constraint that binds, where the step goes, the runners-up, and why not another choice.

    Example: stagewright explain plan.json --why-not tp=4,pp=8
    """
    from stagewright.cli.inputs import parse_pins
    from stagewright.cli.simulate import find_profile
    from stagewright.planner.documents import ModelProfile, Plan
    from stagewright.planner.explanation import Searches
    from stagewright.planner.explanation import explain as explain_plan

    document = Plan.load(plan)
    model = ModelProfile.load(profile) if profile is not None else find_profile(document, plan)
    with progress_bar(quiet=json) as report:
        found = explain_plan(
            document,
            model,
            why_not=parse_pins(why_not, option="why-not") if why_not else None,
            searches=Searches(runners_up, gap, deadline),
            report=report,
        )
    if json:
        print_document(found.model_dump(mode="json"))
    else:
        print_explanation(found)


def print_explanation(found: Explanation) -> None:
    """Print an explanation for people."""
    from rich.table import Table

    screen = console()
    proof = "" if found.bound_s is None else f", bound {seconds_text(found.bound_s)} (gap {found.gap or 0.0:.2%})"
    screen.print(f"[bold]{found.model}[/bold] on {found.cluster}: {found.summary}")
    screen.print(f"step {seconds_text(found.step_time_s)}{proof}")
    screen.print(f"binding: {found.binding.message}")
    screen.print(f"of the step: {_shares_text(found.shares, found.step_time_s)}")
    table = Table("rank", "on the path", "busy", "peak memory", "of", "mostly", box=None)
    for rank in found.ranks:
        table.add_row(
            str(rank.pipeline_rank),
            seconds_text(rank.path_s),
            seconds_text(rank.busy_s),
            bytes_text(rank.peak_bytes),
            bytes_text(rank.available_bytes),
            rank.largest_item,
        )
    screen.print(table)
    for place, other in enumerate(found.runners_up, start=2):
        screen.print(
            f"  {place}. {other.summary}: {seconds_text(other.step_time_s)} ({other.slower:+.2%}), "
            f"{bytes_text(other.peak_memory_bytes)}"
        )
    if found.why_not is not None:
        _print_why_not(found.why_not)


def _shares_text(shares: PathShares, step_s: float) -> str:
    values = {name: float(getattr(shares, f"{name}_s")) for name in _PARTS}
    return ", ".join(
        f"{name} {seconds_text(value)} ({value / step_s:.1%})" for name, value in values.items() if value > 0
    )


def _print_why_not(answer: WhyNot) -> None:
    from rich.table import Table

    from stagewright.cli.plan import print_diagnosis

    screen = console()
    asked = ", ".join(answer.pins)
    if answer.plan is None:
        screen.print(f"why not {asked}: no such plan ({answer.status})")
        if answer.diagnosis is not None:
            print_diagnosis(answer.diagnosis)
        return
    assert answer.slower is not None and answer.binding is not None
    word = "slower" if answer.slower >= 0 else "faster"
    screen.print(f"why not {asked}: the best such plan is {abs(answer.slower):.2%} {word}; {answer.binding.message}")
    table = Table("", "plan", asked, box=None)
    for row in answer.comparison:
        table.add_row(row.name, _cell(row.name, row.plan), _cell(row.name, row.other))
    screen.print(table)


def _cell(name: str, value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if name.endswith("_s"):
        return seconds_text(value)
    return bytes_text(value) if name.endswith("_bytes") else f"{value:.4g}"
