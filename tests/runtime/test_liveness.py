"""How long a silent rank is waited for: less where it is known to be stopped or gone than where it may only be slow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")
from stagewright.runtime.liveness import SILENT_AFTER_S, STARTUP_S, STOPPED_AFTER_S, silence_limit_s


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


def _beat(pid: int, host: str = "here") -> bytes:
    return json.dumps([7, 0, 3, host, pid]).encode()


def test_a_running_process_is_waited_for_longer_than_a_stopped_one_or_one_that_is_gone(process) -> None:
    assert silence_limit_s(_beat(process.pid), "here") == SILENT_AFTER_S
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert silence_limit_s(_beat(process.pid), "here") == STOPPED_AFTER_S
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert silence_limit_s(_beat(process.pid), "here") == STOPPED_AFTER_S
    process.wait()
    assert silence_limit_s(_beat(process.pid), "here") == STOPPED_AFTER_S < SILENT_AFTER_S


def test_of_a_process_on_another_machine_nothing_is_known(process) -> None:
    process.kill()
    process.wait()
    assert silence_limit_s(_beat(process.pid, "there"), "here") == SILENT_AFTER_S
    assert silence_limit_s(b"", "here") == STARTUP_S
