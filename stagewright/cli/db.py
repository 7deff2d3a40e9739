"""`stagewright db`: the service's tables."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from stagewright.cli.output import Json, print_document
from stagewright.planner.errors import InvalidArgument

app = typer.Typer(no_args_is_help=True)

Database = Annotated[str | None, typer.Option(help="The service's database. [a file in the user's state folder]")]


@app.command()
def upgrade(database: Database = None, json: Json = False) -> None:
    """Bring the tables to this version.

    Example: stagewright db upgrade --database postgresql://stagewright@db/stagewright
    """
    from stagewright.api import database as databases
    from stagewright.api.settings import load_settings

    engine = databases.open_engine(load_settings(database_url=database).database_url)
    before = databases.pending(engine)
    databases.upgrade(engine)
    if json:
        print_document({"upgraded": before is not None})
    else:
        sys.stdout.write("the tables are at this version now\n" if before else "the tables were at this version\n")


@app.command()
def check(database: Database = None, json: Json = False) -> None:
    """Exit 0 when the tables are at this version, 2 when they are not.

    Example: stagewright db check
    """
    from stagewright.api import database as databases
    from stagewright.api.settings import load_settings

    difference = databases.pending(databases.open_engine(load_settings(database_url=database).database_url))
    if difference is not None:
        found, needed = difference
        raise InvalidArgument(
            f"the tables are at revision {found}, this version needs {needed}",
            field="database",
            hint="run `stagewright db upgrade`",
        )
    if json:
        print_document({"current": True})
    else:
        sys.stdout.write("the tables are at this version\n")
