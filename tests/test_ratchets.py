"""What others rely on does not change by accident: command-line options, document schemas, REST paths, public names.

A deliberate change is recorded with STAGEWRIGHT_UPDATE_GOLDEN=1 and reviewed in the diff of tests/golden.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
from pathlib import Path

import pytest

from stagewright.cli.main import COMMANDS
from stagewright.planner.documents import Cluster, ModelProfile, Plan, TrainingJob
from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.request import PlanRequest
from stagewright.planner.schedules.registry import families

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]


def command_options() -> dict[str, list[str]]:
    """Parameters of every command by name."""
    found: dict[str, list[str]] = {}
    for name, command in COMMANDS.items():
        module = importlib.import_module(f"stagewright.cli.{command.module}")
        if hasattr(module, "app"):
            for sub in module.app.registered_commands:
                callback = sub.callback
                found[f"{name} {sub.name or callback.__name__}"] = sorted(inspect.signature(callback).parameters)
            callback = getattr(module.app.registered_callback, "callback", None)
            if callback is not None:
                found[name] = sorted(inspect.signature(callback).parameters)
        else:
            found[name] = sorted(inspect.signature(getattr(module, name)).parameters)
    return found


def document_fields() -> dict[str, list[str]]:
    """Fields of every object of every document schema."""
    found: dict[str, list[str]] = {}
    for document in (ModelProfile, Cluster, TrainingJob, Plan, PlanRequest, PlanOutcome):
        schema = document.model_json_schema()
        found[document.document_name] = sorted(schema["properties"])
        for name, part in schema.get("$defs", {}).items():
            if "properties" in part:
                found[f"{document.document_name}.{name}"] = sorted(part["properties"])
    return found


def rest_paths() -> dict[str, list[str]]:
    """Methods of every path of the service."""
    from stagewright.api.app import create_app
    from stagewright.api.composition import default_backend
    from stagewright.api.settings import Settings

    paths = create_app(Settings(), default_backend(max_devices=8)).openapi()["paths"]
    return {path: sorted(methods) for path, methods in paths.items()}


def public_names() -> dict[str, list[str]]:
    """Public functions and classes of the modules that users import, read from the source."""
    folders = ("stagewright/testing", "stagewright/planner/documents", "stagewright/client")
    files = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    files += [
        ROOT / "stagewright/planner/planning.py",
        ROOT / "stagewright/planner/prediction.py",
        ROOT / "stagewright/runtime/run.py",
    ]
    found = {}
    for path in files:
        tree = ast.parse(path.read_text())
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = sorted(node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_"))
        if names:
            found[str(path.relative_to(ROOT))] = names
    return found


def schedule_names() -> dict[str, list[str]]:
    """Names and aliases of every schedule."""
    return {row.name: sorted(row.aliases) for row in families()}


RATCHETS = {
    "command_options": command_options,
    "document_fields": document_fields,
    "rest_paths": rest_paths,
    "public_names": public_names,
    "schedule_names": schedule_names,
}


@pytest.mark.parametrize("name", RATCHETS)
def test_what_others_rely_on_is_what_was_agreed(name):
    current = RATCHETS[name]()
    path = GOLDEN / f"{name}.json"
    if os.environ.get("STAGEWRIGHT_UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(json.dumps(current, indent=1, sort_keys=True) + "\n")
    agreed = json.loads(path.read_text())
    missing = {
        key: sorted(set(agreed[key]) - set(current.get(key, [])))
        for key in agreed
        if key not in current or set(agreed[key]) - set(current[key])
    }
    added = {
        key: sorted(set(current[key]) - set(agreed.get(key, [])))
        for key in current
        if key not in agreed or set(current[key]) - set(agreed[key])
    }
    assert not missing, f"gone: {missing}; if on purpose, run with STAGEWRIGHT_UPDATE_GOLDEN=1"
    assert not added, f"new: {added}; record it with STAGEWRIGHT_UPDATE_GOLDEN=1"
