"""Serves the fakes over HTTP: `python fake_server.py DATABASE_URL [SETTING=VALUE ...]` prints its URL, then serves."""

from __future__ import annotations

import json
import socket
import sys

import fakes
import uvicorn

from stagewright.api.app import create_app
from stagewright.api.settings import load_settings


def main() -> None:
    overrides = dict(argument.split("=", 1) for argument in sys.argv[2:])
    settings = load_settings(database_url=sys.argv[1], **overrides)
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
    config = uvicorn.Config(create_app(settings, fakes.FAKES), timeout_graceful_shutdown=1, access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
