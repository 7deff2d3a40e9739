"""Servers for the tests: real processes on a loopback port, with the fakes or with the real backend."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.api.postgres import private_postgres

FAKE_SERVER = Path(__file__).parent / "fake_server.py"


@dataclass
class Server:
    """A server process with a client for it."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=70)

    def ask(
        self, *, fake: str = "quick", name: str = "", headers: dict[str, str] | None = None, **extra: object
    ) -> httpx.Response:
        labels = {"fake": fake} | ({"name": name} if name else {})
        body = {"model": "gpt2", "cluster": "mocked", "job": job(), "labels": labels} | extra
        return self.http.post("/v1/plans", json=body, headers={"Cache-Control": "no-cache"} | (headers or {}))

    def final(self, plan_id: str, wait_s: float = 30) -> dict[str, object]:
        answer = self.http.get(f"/v1/plans/{plan_id}", params={"wait": wait_s}).json()
        assert answer["state"] not in ("queued", "running"), answer
        return answer

    def until(
        self, plan_id: str, condition: Callable[[dict[str, object]], bool], timeout_s: float = 20
    ) -> dict[str, object]:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            answer = self.http.get(f"/v1/plans/{plan_id}").json()
            if condition(answer):
                return answer
            time.sleep(0.02)
        raise AssertionError(f"never came true: {answer}")

    def solves(self, name: str) -> list[int]:
        """Processes that worked on the plan of this name, one entry for each start."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [int(line.split()[2]) for line in lines if line.split()[0] == name]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


def job(**extra: object) -> dict[str, object]:
    return {"global_batch": 8, "sequence_length": 128} | extra


@contextmanager
def serve_fakes(folder: Path, *, url: str | None = None, **settings: object) -> Iterator[Server]:
    """A server of the fakes; its files lie in `folder`."""
    database = url or f"sqlite:///{folder / 'service.db'}"
    options = {"workers": 2, "stop_grace_s": 0.5} | settings
    command = [sys.executable, str(FAKE_SERVER), database, *(f"{key}={value}" for key, value in options.items())]
    with _serve(command, folder, {"FAKE_LOG": str(folder / "solves.log")}) as server:
        yield server


@contextmanager
def serve_real(folder: Path, *arguments: str) -> Iterator[Server]:
    """`stagewright serve` as a user starts it."""
    program = "from stagewright.cli.main import main; main()"
    database = f"sqlite:///{folder / 'service.db'}"
    command = [sys.executable, "-c", program, "serve", "--json", "--port", "0", "--database", database, *arguments]
    with _serve(command, folder, {}) as server:
        yield server


@contextmanager
def _serve(command: list[str], folder: Path, variables: dict[str, str]) -> Iterator[Server]:
    with (folder / "server.log").open("a") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | variables
        )
        try:
            assert process.stdout is not None
            text = ""
            while not text.rstrip().endswith("}"):
                line = process.stdout.readline()
                assert line, f"the server ended: {(folder / 'server.log').read_text()}"
                text += line
            server = Server(process, json.loads(text)["url"], folder / "solves.log")
            _wait_ready(server)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(server: Server) -> None:
    # Long, because on a machine's first start the solver processes compile the planner's kernels.
    end = time.monotonic() + 400
    while time.monotonic() < end:
        try:
            if server.http.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server never became ready")


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private PostgreSQL server; skips where it is not installed."""
    with private_postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of the fakes for all tests that leave it as they found it."""
    with serve_fakes(tmp_path_factory.mktemp("fakes"), max_body_bytes=200_000, task_timeout_s=3) as server:
        yield server
