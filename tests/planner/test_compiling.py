"""Two processes that need the same compiled function compile it once."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

_MODULE = """
from numba import njit

@njit(cache=True)
def inner(count):
    total = 0
    for index in range(count):
        total += index * index
    return total

@njit(cache=True)
def outer(count):
    return inner(count) + 1
"""
_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import twice.functions as functions
from stagewright.planner.compiling import share_caches
before = share_caches(int(sys.argv[2]), None, "twice.")
assert len(before) == 2
print("ready", flush=True)
sys.stdin.readline()
assert functions.outer(5) == 31
print(sum(sum(function.stats.cache_misses.values()) for function in (functions.inner, functions.outer)))
"""


def test_a_function_that_two_processes_need_is_compiled_by_one(tmp_path: Path) -> None:
    package = tmp_path / "twice"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "functions.py").write_text(_MODULE)
    with tempfile.TemporaryFile() as locks:
        command = [sys.executable, "-c", _PROGRAM, str(tmp_path), str(locks.fileno())]
        processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(locks.fileno(),)
            )
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        misses = [int(process.communicate("go\n")[0]) for process in processes]
    assert sum(misses) == 2, misses
