"""`stagewright systems` is honest: every claim names a system of the list, a command that runs, and a test that exists."""

from __future__ import annotations

import ast
import json
from importlib import resources
from pathlib import Path

import pytest

from stagewright.cli.main import COMMANDS, run
from stagewright.cli.systems import system_rows

ROOT = Path(__file__).parents[1]


def claims() -> list[dict[str, str]]:
    folder = resources.files("stagewright.cli") / "systems_data"
    files = sorted(entry for entry in folder.iterdir() if entry.name.endswith(".json") and entry.name != "rows.json")
    return [claim for file in files for claim in json.loads(file.read_text(encoding="utf-8"))]


def test_the_list_holds_the_124_systems_and_those_beyond():
    rows = system_rows()
    assert sum(not row["beyond"] for row in rows) == 124
    assert sum(row["beyond"] for row in rows) == 34
    assert len({row["name"] for row in rows}) == len(rows)


def test_every_claim_names_a_system_of_the_list_once():
    known = {row["name"] for row in system_rows()}
    names = [claim["name"] for claim in claims()]
    assert sorted(set(names) - known) == []
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: claim["name"])
def test_a_claim_has_a_test_that_exists_and_a_command_that_is_ours(claim):
    assert claim["status"] in ("works", "partial")
    file, _, name = claim["test"].partition("::")
    path = ROOT / file
    assert path.is_file(), claim["test"]
    if name:
        functions = {
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert name.split("::")[-1].partition("[")[0] in functions, claim["test"]
    words = claim["how"].split()
    if words[0] == "stagewright":
        assert words[1] in COMMANDS
    else:
        assert words[0] == "python"
        assert (ROOT / words[1]).is_file() or words[1] == "-m"


def test_the_command_prints_every_row_with_the_agreed_keys(capsys):
    assert run(["systems", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 158
    assert set(rows[0]) == {"name", "tier", "kind", "status", "how", "test", "beyond"}
