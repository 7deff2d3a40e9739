"""Forks of this process."""

from __future__ import annotations

import os
import signal
import warnings
from contextlib import suppress


def start_fork() -> int:
    """Return 0 in a fork of this process, and its number here. A fork calls nothing of the threads that are beside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        return os.fork()


def end_fork(process: int) -> None:
    """End a fork, whatever it does."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
