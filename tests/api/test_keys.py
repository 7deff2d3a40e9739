"""Keys: needed from the first one on, limited to their scopes, worthless once revoked; and no open door by mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stagewright.api.database import open_engine, upgrade
from stagewright.api.store import Store
from tests.api.conftest import serve_fakes


def test_keys_guard_everything_but_health_and_the_page(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'service.db'}")
    upgrade(engine)
    store = Store(engine)
    reader, read_secret = store.create_key("reader", ["read"])
    _, plan_secret = store.create_key("planner", ["read", "plan"])
    with serve_fakes(tmp_path, workers=1) as server:
        bearer = {secret: {"Authorization": f"Bearer {secret}"} for secret in (read_secret, plan_secret, "pk_wrong")}
        assert server.http.get("/v1/plans").status_code == 401
        assert server.http.get("/v1/plans").headers["www-authenticate"].startswith("Bearer")
        assert server.http.get("/v1/plans", headers=bearer["pk_wrong"]).json()["type"] == "/problems/unauthorized"
        assert server.http.get("/v1/plans", headers=bearer[read_secret]).status_code == 200
        assert server.ask(headers=bearer[read_secret]).json()["type"] == "/problems/forbidden"
        assert server.ask(headers=bearer[plan_secret] | {"Prefer": "wait=20"}).status_code == 201
        assert [server.http.get(path).status_code for path in ("/livez", "/readyz", "/", "/version")] == [200] * 4
        store.revoke_key(reader.id)
        assert server.http.get("/v1/plans", headers=bearer[read_secret]).status_code == 401
        assert plan_secret.encode() not in (tmp_path / "service.db").read_bytes()


def stagewright(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from stagewright.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--host", "0.0.0.0", "--port", "0"], "host"),
        (["--port", "-1"], "port"),
        (["--database", "mysql://x"], "database_url"),
        (["--database", "sqlite:////no/such/folder/x.db"], "database_url"),
        (["--database", "sqlite:////dev/null"], "database_url"),
        (["--workers", "0"], "workers"),
    ],
)
def test_serve_refuses_what_it_cannot_do(tmp_path: Path, arguments: list[str], field: str) -> None:
    if "--database" not in arguments:
        arguments = [*arguments, "--database", f"sqlite:///{tmp_path / 'service.db'}"]
    done = stagewright("serve", "--json", *arguments)
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout)["error"]
    assert (error["field"], bool(error["hint"])) == (field, True)
    assert "Traceback" not in done.stderr


def test_keys_are_made_listed_and_revoked_from_the_command_line(tmp_path: Path) -> None:
    database = ["--database", f"sqlite:///{tmp_path / 'service.db'}"]
    made = json.loads(stagewright("keys", "create", "controller", "--scope", "read", "--json", *database).stdout)
    assert made["secret"].startswith("pk_")
    assert stagewright("keys", "revoke", made["id"], *database).returncode == 0
    listed = json.loads(stagewright("keys", "list", "--json", *database).stdout)
    assert listed == [{"id": made["id"], "name": "controller", "scopes": ["read"], "revoked": True}]
    assert stagewright("keys", "revoke", made["id"], *database).returncode == 2


def test_tables_are_checked_and_upgraded_from_the_command_line(tmp_path: Path) -> None:
    database = ["--database", f"sqlite:///{tmp_path / 'service.db'}"]
    assert stagewright("db", "check", *database).returncode == 2
    assert json.loads(stagewright("db", "upgrade", "--json", *database).stdout) == {"upgraded": True}
    assert stagewright("db", "check", *database).returncode == 0
