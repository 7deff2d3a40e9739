"""Docstrings keep in step with what they describe: a documented parameter exists, and public numbers carry their unit."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "stagewright").rglob("*.py"))
_UNDERLINE = re.compile(r"^\s*-{3,}\s*$")
_ENTRY = re.compile(r"^(\*{0,2}\w+(?:, ?\*{0,2}\w+)*) ?:")


def documented(docstring: str) -> list[str]:
    """Return the names that a docstring's Parameters section lists."""
    lines = docstring.splitlines()
    names: list[str] = []
    for index, line in enumerate(lines[:-1]):
        if line.strip() != "Parameters" or not _UNDERLINE.match(lines[index + 1]):
            continue
        indent = len(line) - len(line.lstrip())
        for row, entry in enumerate(lines[index + 2 :], index + 2):
            ends = row + 1 < len(lines) and _UNDERLINE.match(lines[row + 1])
            if ends or not entry.strip():
                break
            match = _ENTRY.match(entry[indent:])
            if match:
                names += [name.strip(" *") for name in match[1].split(",")]
    return names


def known_names(node: ast.AST) -> set[str]:
    """Return the parameters of a function, or the fields and the constructor's parameters of a class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [item for item in (arguments.vararg, arguments.kwarg) if item is not None]
        return {argument.arg for argument in every}
    names: set[str] = set()
    for item in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            names.add(item.target.id)
        elif isinstance(item, ast.FunctionDef):
            names.add(item.name)
            names |= known_names(item) if item.name == "__init__" else set()
    return names


def wrong_names(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = documented(ast.get_docstring(node) or "")
            found += [
                f"{path.relative_to(ROOT)}: {node.name}: {name}" for name in names if name not in known_names(node)
            ]
    return found


def test_every_documented_parameter_exists():
    assert [line for path in FILES for line in wrong_names(path)] == []


def test_a_parameter_that_was_renamed_is_noticed():
    text = 'def f(new):\n    """Do.\n\n    Parameters\n    ----------\n    old, new : a number.\n    """\n'
    node = ast.parse(text).body[0]
    assert [name for name in documented(ast.get_docstring(node)) if name not in known_names(node)] == ["old"]


@pytest.mark.parametrize("document", ["cluster", "job", "plan", "profile"])
def test_every_number_of_seconds_or_bytes_in_a_document_says_so_in_its_name(document):
    """Except the items of memory, whose class says bytes for all of them, and spreads, which go by the field they spread."""
    from stagewright.planner.documents.plan import MemoryItems

    tree = ast.parse((ROOT / "stagewright/planner/documents" / f"{document}.py").read_text())
    wrong = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        words = set(re.findall(r"\w+", ast.unparse(node.annotation)))
        name = node.target.id
        if ("Seconds" in words and not name.endswith("_s") and name != "spread") or (
            "Bytes" in words and "bytes" not in name and name not in MemoryItems.model_fields
        ):
            wrong.append(name)
    assert wrong == []
