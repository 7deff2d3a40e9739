"""Several servers on one PostgreSQL: the same service, the same answers, and a plan outlives the server that ran it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from stagewright.api.database import open_engine
from tests.api.conftest import serve_fakes

pytestmark = pytest.mark.postgres


def stagewright(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from stagewright.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def database(postgres_url: str) -> str:
    engine = open_engine(postgres_url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("CREATE DATABASE service"))
    engine.dispose()
    return postgres_url.replace("/postgres", "/service")


def test_a_database_of_another_version_is_refused_until_it_is_upgraded(database: str) -> None:
    refused = stagewright("serve", "--json", "--port", "0", "--database", database)
    assert refused.returncode == 2
    assert "stagewright db upgrade" in json.loads(refused.stdout)["error"]["hint"]
    assert stagewright("db", "upgrade", "--database", database).returncode == 0
    assert stagewright("db", "check", "--database", database).returncode == 0


def test_two_servers_share_one_store_and_one_takes_over_from_the_other(database: str, tmp_path: Path) -> None:
    stagewright("db", "upgrade", "--database", database)
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    with serve_fakes(folders[0], url=database, workers=1, lease_s=1.5) as first:
        running = first.ask(fake="slow", name="running", deadline_s=60).json()["id"]
        first.until(running, lambda plan: plan["state"] == "running")
        with serve_fakes(folders[1], url=database, workers=1, lease_s=1.5) as second:
            other = first.ask(name="other", headers={"Prefer": "wait=20"}).json()
            assert other["state"] == "succeeded"
            assert second.solves("other"), "the idle server took it"
            assert second.http.get(f"/v1/plans/{other['id']}").json() == other
            first.kill()
            end = time.monotonic() + 60
            while not second.solves("running") and time.monotonic() < end:
                time.sleep(0.05)
            second.http.post(f"/v1/plans/{running}/cancel")
            assert second.final(running)["state"] == "succeeded"
