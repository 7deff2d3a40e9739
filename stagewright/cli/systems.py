"""`stagewright systems`: every system of the literature, whether it works here, the command that shows it, its test.

`systems_data/rows.json` lists the systems; the other files there say, area by area, what works. A row nobody claims is
absent.
"""

from __future__ import annotations

import json as json_text
from importlib import resources
from typing import Annotated, Literal, TypedDict

import typer

from stagewright.cli.output import Json, console, print_document

Status = Literal["works", "partial", "absent"]


class SystemRow(TypedDict):
    """One row as it is printed."""

    name: str
    tier: str
    kind: str
    status: Status
    how: str
    test: str
    beyond: bool


def systems(
    status: Annotated[str, typer.Option(help="Show only rows of this status: works, partial or absent.")] = "",
    json: Json = False,
) -> None:
    """List every published system with its status here, the command that shows it and the test that pins it.

    Example: stagewright systems --status works
    """
    rows = [row for row in system_rows() if status in ("", row["status"])]
    if json:
        print_document([dict(row) for row in rows])
        return
    from rich.table import Table

    works = sum(row["status"] == "works" for row in rows)
    table = Table("system", "tier", "kind", "status", "how", title=f"{works} of {len(rows)} systems work", box=None)
    for row in rows:
        table.add_row(row["name"], row["tier"][:1], row["kind"], row["status"], row["how"])
    console().print(table)


def system_rows() -> list[SystemRow]:
    """Return all rows, in the order of the literature list."""
    folder = resources.files("stagewright.cli") / "systems_data"
    claims: dict[str, dict[str, str]] = {}
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".json") and file.name != "rows.json":
            for claim in json_text.loads(file.read_text(encoding="utf-8")):
                claims[claim["name"]] = claim
    rows: list[SystemRow] = []
    for row in json_text.loads((folder / "rows.json").read_text(encoding="utf-8")):
        claim = claims.get(row["name"], {})
        rows.append(
            {
                "name": row["name"],
                "tier": row["tier"],
                "kind": row["kind"],
                "status": claim.get("status", "absent"),  # type: ignore[typeddict-item]
                "how": claim.get("how", ""),
                "test": claim.get("test", ""),
                "beyond": row["beyond"],
            }
        )
    return rows
