"""Answers short tasks (simulations, validations) in one solver process of its own, killed when a task takes too long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from stagewright.api.problems import KINDS, Problem, pointer_of
from stagewright.api.solver_process import ProcessDied, SolverProcess
from stagewright.api.tasks import Answer, Refusal, Task, TaskFunction

_LOG = logging.getLogger(__name__)

_START_S = 600.0
_MAX_WAITING = 8


class Desk:
    """One process, one task at a time, those who wait in turn."""

    def __init__(self, *, timeout_s: float, memory_bytes: int | None, prepare: Callable[[], None] | None) -> None:
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._prepare = prepare
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(_MAX_WAITING)
        self._process: SolverProcess | None = None

    def warm_up(self) -> None:
        """Start the process, so that the first task finds it ready."""
        with self._turn:
            self._open()

    def close(self) -> None:
        """End the process and whatever it does."""
        if self._process is not None:
            self._process.kill()

    def answer(self, function: TaskFunction, argument: str) -> str:
        """Return what `function(argument, context)` returns; raises Problem when it refuses, fails or takes too long.

        A process that dies is replaced once: it may have died before this task came. Its start is not counted.
        """
        if not self._places.acquire(blocking=False):
            raise Problem("not-ready", f"{_MAX_WAITING} simulations wait already", headers={"Retry-After": "2"})
        try:
            with self._turn:
                reply = self._reply_of_two(Task(function, argument, self._timeout_s))
        except ProcessDied as error:
            raise Problem("internal", f"the simulation's process died: {error}") from error
        finally:
            self._places.release()
        if isinstance(reply, Answer):
            return reply.text
        if reply.traceback:
            _LOG.error("a task failed: %s\n%s", reply.message, reply.traceback)
        raise problem_of_refusal(reply)

    def _reply_of_two(self, task: Task) -> Answer | Refusal:
        try:
            return self._reply(task)
        except ProcessDied:
            self._drop()
        try:
            return self._reply(task)
        except ProcessDied:
            self._drop()
            raise

    def _reply(self, task: Task) -> Answer | Refusal:
        process = self._open()
        if not process.wait_ready(_START_S):
            self._drop()
            raise Problem("not-ready", "the simulator does not start")
        process.start(task)
        end = time.monotonic() + task.deadline_s
        while (left := end - time.monotonic()) > 0:
            reply = process.next_reply(left)
            if isinstance(reply, Answer | Refusal):
                return reply
        self._drop()
        raise Problem("task-timeout", f"not done after {self._timeout_s:g} s", hint="a smaller plan takes less")

    def _open(self) -> SolverProcess:
        if self._process is None:
            self._process = SolverProcess(prepare=self._prepare, memory_bytes=self._memory_bytes)
        return self._process

    def _drop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


def problem_of_refusal(reply: Refusal) -> Problem:
    """Return the problem that says why a task refused its argument."""
    kind = reply.kind if reply.kind in KINDS else "invalid-argument"
    errors = [{"pointer": pointer_of(reply.field), "detail": reply.message}] if reply.field else []
    return Problem(kind, reply.message, hint=reply.hint, errors=errors)
