"""Compiled functions that only compiled functions call have no wrapper for Python: it takes a third of their compilation.

Called from Python, one without a wrapper ends the process, so both directions are held here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("stagewright", "tests", "benchmarks", "examples", "docs")

Function = tuple[str, str]  # module and name


@cache
def trees() -> dict[str, ast.Module]:
    """Syntax trees of all our Python files by module name."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}


def compiled_functions(tree: ast.Module) -> dict[str, tuple[ast.FunctionDef, bool]]:
    """Functions under `njit` by name, and whether each is without a wrapper."""
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            name, keywords = (mark.func, mark.keywords) if isinstance(mark, ast.Call) else (mark, [])
            if isinstance(name, ast.Name) and name.id == "njit":
                found[node.name] = (node, any(keyword.arg == "no_cpython_wrapper" for keyword in keywords))
    return found


def interpreted_names(tree: ast.Module) -> Iterator[ast.expr]:
    """Names and attributes that are read outside of compiled functions."""
    compiled = {
        id(node)
        for function, _ in compiled_functions(tree).values()
        for line in function.body
        for node in ast.walk(line)
    }
    for node in ast.walk(tree):
        if id(node) not in compiled and isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node


def called_from_python() -> set[Function]:
    """Functions, compiled or not, that interpreted code names: those of its own module and those it imports."""
    found = set()
    for module, tree in trees().items():
        imports = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        for node in interpreted_names(tree):
            if isinstance(node, ast.Name):
                found.add(imports.get(node.id, (module, node.id)))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imports:
                found.add((".".join(imports[node.value.id]), node.attr))
    return found


def test_exactly_what_only_compiled_functions_call_has_no_wrapper_for_python():
    called = called_from_python()
    compiled = {
        (module, name): bare
        for module, tree in trees().items()
        if module.startswith("stagewright.")
        for name, (_, bare) in compiled_functions(tree).items()
    }
    assert len(compiled) > 100
    unsafe = sorted(function for function, bare in compiled.items() if bare and function in called)
    assert not unsafe, "called from Python: take no_cpython_wrapper away"
    slow = sorted(function for function, bare in compiled.items() if not bare and function not in called)
    assert not slow, "called by compiled functions alone: add no_cpython_wrapper=True"
