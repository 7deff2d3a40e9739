"""`stagewright keys`: who may use a service that others can reach."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from stagewright.cli.output import Json, console, print_document
from stagewright.planner.errors import InvalidArgument

if TYPE_CHECKING:
    from stagewright.api.store import Key, Store

app = typer.Typer(no_args_is_help=True)

Database = Annotated[str | None, typer.Option(help="The service's database. [a file in the user's state folder]")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    scope: Annotated[list[str] | None, typer.Option(help="read, plan or admin; repeatable. [read and plan]")] = None,
    database: Database = None,
    json: Json = False,
) -> None:
    """Make a key and print its secret, once; from the first key on, the service asks for one.

    Example: stagewright keys create cluster-controller
    """
    from stagewright.api.auth import SCOPES

    scopes = scope or ["read", "plan"]
    for wanted in scopes:
        if wanted not in SCOPES:
            raise InvalidArgument(f"there is no scope {wanted!r}", field="scope", hint="one of " + ", ".join(SCOPES))
    key, secret = _store(database).create_key(name, scopes)
    if json:
        print_document({**_document(key), "secret": secret})
    else:
        sys.stdout.write(secret + "\n")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `keys list` shows it.")],
    database: Database = None,
    json: Json = False,
) -> None:
    """Make a key worthless at once.

    Example: stagewright keys revoke key_0123456789ab
    """
    if not _store(database).revoke_key(key_id):
        raise InvalidArgument(f"no key {key_id!r} is in force", field="key_id", hint="see `stagewright keys list`")
    if json:
        print_document({"id": key_id, "revoked": True})


@app.command("list")
def list_keys(database: Database = None, json: Json = False) -> None:
    """List keys without their secrets.

    Example: stagewright keys list
    """
    keys = _store(database).list_keys()
    if json:
        print_document([_document(key) for key in keys])
        return
    for key in keys:
        console().print(f"{key.id}  {key.name}  {' '.join(key.scopes)}{'  revoked' if key.revoked_at else ''}")


def _store(database: str | None) -> Store:
    from stagewright.api.database import open_engine
    from stagewright.api.service import check_tables
    from stagewright.api.settings import load_settings
    from stagewright.api.store import Store

    engine = open_engine(load_settings(database_url=database).database_url)
    check_tables(engine)
    return Store(engine)


def _document(key: Key) -> dict[str, object]:
    return {"id": key.id, "name": key.name, "scopes": list(key.scopes), "revoked": key.revoked_at is not None}
