"""A private PostgreSQL server in a temporary folder, for as long as a test needs it."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def private_postgres(folder: Path) -> Iterator[str]:
    """The URL of a server of its own; skips where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
    programs = found[-1].parent
    if not (programs / "initdb").exists():
        pytest.skip("PostgreSQL's initdb is not installed")
    user = _user_without_rights()
    home = Path(subprocess.run([*_as(user), "mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
    port = _free_port()
    options = ["-c", f"port={port}", "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={home}"]
    _run([*_as(user), str(programs / "initdb"), "-D", str(home / "data"), "-A", "trust", "-U", "tester", "--no-sync"])
    with (folder / "postgres.log").open("w") as log:
        server = subprocess.Popen(
            [*_as(user), str(programs / "postgres"), "-D", str(home / "data"), *options, "-c", "fsync=off"],
            stdout=log,
            stderr=log,
            cwd="/",
        )
    try:
        _wait_for(port, server, folder / "postgres.log")
        yield f"postgresql://tester@127.0.0.1:{port}/postgres"
    finally:
        _run([*_as(user), str(programs / "pg_ctl"), "-D", str(home / "data"), "-m", "immediate", "stop"])
        server.wait(20)
        shutil.rmtree(home, ignore_errors=True)


def _user_without_rights() -> str | None:
    """PostgreSQL refuses to run as root; name somebody else where this is root."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None) or pytest.skip(
        "root is the only user"
    )


def _as(user: str | None) -> Sequence[str]:
    return [] if user is None else ["setpriv", f"--reuid={user}", "--clear-groups", "--"]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end and server.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                pass
            if "ready to accept connections" in log.read_text():
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"PostgreSQL did not start: {log.read_text()}")
