"""A solver process as the server sees it: a pipe of its own, and a kill that always works.

Each process has its own pipe and no lock is shared between processes: a process may be killed at any instant, and one
that dies while it holds the lock of a common queue would silence the others for ever. `spawn`, because a fork of a
process with threads is a trap.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from stagewright.api.solver_worker import work
from stagewright.api.tasks import Answer, Ready, Refusal, Reply, Stop, Task
from stagewright.planner.documents.outcome import Progress

_JOIN_S = 5.0


class ProcessDied(Exception):
    """The process ended without an answer."""


class SolverProcess:
    """One spawned process that runs one task at a time."""

    def __init__(self, *, prepare: Callable[[], None] | None = None, memory_bytes: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection[Task | Stop, Reply]
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=work, args=(theirs, prepare, memory_bytes), name="stagewright-solver", daemon=True
        )
        self._process.start()
        theirs.close()
        self._is_ready = False

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def wait_ready(self, timeout_s: float) -> bool:
        """Return whether the process is prepared for a task; raises ProcessDied."""
        if not self._is_ready:
            reply = self._receive(timeout_s)
            assert reply is None or isinstance(reply, Ready), reply
            self._is_ready = reply is not None
        return self._is_ready

    def start(self, task: Task) -> None:
        """Give the process a task; raises ProcessDied."""
        try:
            self._pipe.send(task)
        except OSError as error:
            raise ProcessDied(f"process {self.pid} is gone") from error

    def ask_to_stop(self) -> None:
        """Ask the running task to end with what it has; a dead process shows at the next `next_reply`."""
        try:
            self._pipe.send(Stop())
        except OSError:
            return

    def next_reply(self, timeout_s: float) -> Progress | Answer | Refusal | None:
        """Return the next report or the answer, None when nothing came in time; raises ProcessDied."""
        reply = self._receive(timeout_s)
        assert not isinstance(reply, Ready)
        return reply

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._process.kill()
        self._process.join(_JOIN_S)
        self._pipe.close()

    def _receive(self, timeout_s: float) -> Reply | None:
        # The sentinel as well as the pipe: a process that dies at birth may never have opened its end.
        ready = wait([self._pipe, self._process.sentinel], max(0.0, timeout_s))
        if not ready:
            return None
        try:
            if self._pipe.poll():
                return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ProcessDied(f"process {self.pid} closed its pipe") from error
        raise ProcessDied(f"process {self.pid} ended with code {self._process.exitcode}")
