"""`stagewright serve`: the REST service and its playground."""

from __future__ import annotations

import logging
import socket
import sys
from typing import Annotated

import typer

from stagewright.cli.output import Json, print_document
from stagewright.planner.errors import InvalidArgument

_SHUTDOWN_S = 3


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. [8000]")] = None,
    database: Annotated[
        str | None, typer.Option(help="sqlite:////FILE or postgresql://... [a file in the user's state folder]")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Solver processes. [one a core, at most 4]")] = None,
    insecure_no_auth: Annotated[
        bool, typer.Option("--insecure-no-auth", help="Answer without keys, even to other machines.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log each request on stderr.")] = False,
    json: Json = False,
) -> None:
    """Start the service; the playground is at its root. Flags go before `STAGEWRIGHT_*` in the environment.

    Example: stagewright serve --port 8000
    """
    import uvicorn

    from stagewright.api.app import create_app
    from stagewright.api.auth import check_address
    from stagewright.api.composition import default_backend
    from stagewright.api.database import open_engine
    from stagewright.api.service import check_tables
    from stagewright.api.settings import load_settings
    from stagewright.api.store import Store

    settings = load_settings(
        host=host, port=port, database_url=database, workers=workers, insecure_no_auth=insecure_no_auth or None
    )
    engine = open_engine(settings.database_url)
    check_tables(engine)
    check_address(settings, Store(engine))
    engine.dispose()
    if verbose:
        logging.getLogger().setLevel(logging.INFO)
    listener = _listen(settings.host, settings.port)
    address, bound_port = listener.getsockname()[:2]
    url = f"http://{f'[{address}]' if ':' in address else address}:{bound_port}"
    config = uvicorn.Config(
        create_app(settings, default_backend(max_devices=settings.max_devices)),
        log_config=None,
        access_log=verbose,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    if json:
        print_document({"url": url, "database": open_engine(settings.database_url).url.render_as_string()})
    sys.stderr.write(f"Stagewright serves at {url} (stop with Ctrl-C)\n")
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises InvalidArgument for an address that is taken or is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        raise InvalidArgument(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            field="port",
            hint="take another with --port, or a free one with --port 0",
        ) from error
    return listener
