"""Two processes that need the same compiled function compile it once, and the helper ends with who started it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from stagewright.planner.compiling import Helper

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


@pytest.mark.parametrize("fails", [False, True])
def test_the_helper_works_in_silence_and_ends_with_who_started_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fails: bool
) -> None:
    begun, told = tmp_path / "begun", list[int]()

    def work() -> None:
        print("noise", flush=True)
        os.write(2, b"noise")
        (tmp_path / "being_written").write_text(str(os.getpid()))
        (tmp_path / "being_written").rename(begun)
        if fails:
            raise RuntimeError("noise")
        time.sleep(600)

    helper = Helper(work, told.append)
    helper.start()
    helper.start()
    ends = time.monotonic() + 60
    while not begun.exists():
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert told == [0]
    helper.end()
    assert told == [0, 1]
    process = int(begun.read_text())
    assert process != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert capfd.readouterr() == ("", "")
