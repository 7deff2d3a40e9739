"""Functions that Python does not call get no machine code of their own, and nothing else changes."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit

from stagewright.planner.machine_code import for_what_python_calls
from stagewright.planner.search import dual_simplex

_MODULE = """
from numba import njit

@njit(cache=True, no_cpython_wrapper=True)
def inner(count):
    if count < 0:
        raise ValueError("count below zero", count)
    total = 0
    for index in range(count):
        total += index * index
    return total

@njit(cache=True)
def outer(count):
    return inner(count) + 1

@njit(cache=True)
def later(count):
    return inner(count) + outer(count)
"""
_PROGRAM = """
import sys
from contextlib import nullcontext
sys.path.insert(0, sys.argv[1])
import kernels.functions as functions
from stagewright.planner.machine_code import for_what_python_calls
with for_what_python_calls() if sys.argv[2] == "inside" else nullcontext():
    print(functions.outer(5))
    try:
        functions.outer(-3)
    except ValueError as error:
        print(error.args)
def emits(function):
    return bool(function.overloads) and any(found.library._compiled for found in function.overloads.values())
print([sum(function.stats.cache_misses.values()) for function in (functions.inner, functions.outer)])
print(emits(functions.inner), emits(functions.outer))
print(functions.later(5), functions.outer(5))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "functions.py").write_text(_MODULE)
    return tmp_path


def run(package: Path, where: str) -> list[str]:
    """Call the functions in a new process; return its lines."""
    command = [sys.executable, "-c", _PROGRAM, str(package), where]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert "Cannot cache" not in found.stderr
    return found.stdout.splitlines()


ANSWERS = ["31", "('count below zero', -3)"]


def test_only_what_python_calls_gets_machine_code(package: Path) -> None:
    assert run(package, "inside") == [*ANSWERS, "[1, 1]", "False True", "61 31"]


def test_numba_gives_both_machine_code_otherwise(package: Path) -> None:
    assert run(package, "outside") == [*ANSWERS, "[1, 1]", "True True", "61 31"]


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_later_process_loads_what_was_kept(package: Path, where: str) -> None:
    run(package, "inside")
    assert run(package, where)[:3] == [*ANSWERS, "[0, 0]"]
    assert run(package, where)[-1] == "61 31"


def test_the_other_way_round_a_cache_made_outside_is_loaded_inside(package: Path) -> None:
    run(package, "outside")
    assert run(package, "inside")[:3] == [*ANSWERS, "[0, 0]"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the names of x86 instructions")
def test_the_loop_that_pivots_spend_their_time_in_reads_neighbours_at_once() -> None:
    """Blocks that were joined before functions met had it gather numbers one by one: proofs took two and a half times as long."""
    function = njit(fastmath={"reassoc", "contract"})(vars(dual_simplex)["_eliminate"].py_func)

    @njit
    def pivots(table, norm, value, line):
        function(table, norm, value, line, 0, 1, len(value), 0.5, 1.0)

    with for_what_python_calls():
        pivots(np.ones((4, 8)), np.ones(4), np.ones(4), np.ones(8))
    code = "".join(found.library.get_asm_str() for found in pivots.overloads.values())
    assert re.search(r"\bv?(fmadd\w*|mul)pd\b", code)
    assert "gather" not in code
