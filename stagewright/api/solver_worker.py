"""The main function of a solver process: takes one task after another from its pipe until the pipe closes.

Torch is never imported here, so that a killed process is replaced in about a second.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait

from stagewright.api.tasks import Answer, Ready, Refusal, Reply, Stop, Task
from stagewright.planner.documents.outcome import Progress
from stagewright.planner.errors import StagewrightError

_LOG = logging.getLogger(__name__)

# Each process has one solve and one thread: as many processes as cores, and no more threads than cores.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_POLL_INTERVAL_S = 0.005
_REPORT_INTERVAL_S = 0.1


def work(
    connection: Connection[Reply, Task | Stop], prepare: Callable[[], None] | None, memory_bytes: int | None
) -> None:
    """Call `prepare`, then answer tasks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    for variable in _THREAD_VARIABLES:
        os.environ.setdefault(variable, "1")
    if prepare is not None:
        try:
            prepare()
        except Exception:
            _LOG.exception("a solver process could not be prepared; its first task will take longer, or fail")
    try:
        connection.send(Ready())
        while True:
            task = connection.recv()
            if isinstance(task, Task):  # a Stop that came after its task's answer means nothing
                connection.send(_run(task, connection))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _run(task: Task, connection: Connection[Reply, Task | Stop]) -> Answer | Refusal:
    try:
        return Answer(task.function(task.argument, _Context(connection, task.deadline_s)))
    except StagewrightError as error:
        return Refusal(error.kind, error.message, error.field, error.hint)
    except MemoryError:
        return Refusal("internal", "the solver's process is out of memory", hint="ask for a smaller search space")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        return Refusal("internal", f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


class _Context:
    def __init__(self, connection: Connection[Reply, Task | Stop], deadline_s: float) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + deadline_s
        self._stopped = False
        self._asked_at = 0.0
        self._reported_at = 0.0
        self._phase = ""

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def report(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._reported_at < _REPORT_INTERVAL_S and progress.phase == self._phase:
            return
        self._reported_at, self._phase = now, progress.phase
        self._connection.send(
            replace(progress, incumbent_s=_finite(progress.incumbent_s), bound_s=_finite(progress.bound_s))
        )

    def should_stop(self) -> bool:
        now = time.monotonic()
        if not self._stopped and now - self._asked_at >= _POLL_INTERVAL_S:
            self._asked_at = now
            self._stopped = now >= self._deadline or (
                self._connection.poll() and isinstance(self._connection.recv(), Stop)
            )
        return self._stopped


def _finite(value_s: float | None) -> float | None:
    """Return None for an infinity, which JSON cannot hold: there is no incumbent yet, or no bound."""
    return value_s if value_s is not None and math.isfinite(value_s) else None


def _end_with_parent() -> None:
    """End this process when the server is gone, even in the middle of native code."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
