"""Local ranks: processes of one thread each that run the same function at the same time.

A rank is `python -m stagewright.profiler.ranks`; it reads one JSON request from its standard input, writes JSON lines
to its standard output (`progress` and one `result`), and lives no longer than that input is open, so that the end of
the parent, however sudden, ends its ranks.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stagewright.planner.errors import RunFailed

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

ReportsProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RankContext:
    """What a rank's function is given besides its arguments."""

    rank: int
    num_ranks: int
    rendezvous: str
    report: ReportsProgress
    stopped: threading.Event


def run_ranks(
    function: str,
    num_ranks: int,
    arguments: Mapping[str, object],
    *,
    timeout_s: float = 120.0,
    num_threads: int = 1,
    report: ReportsProgress | None = None,
) -> list[object]:
    """Return what `function` (`module:name`, called with a RankContext and the arguments) gave on each rank.

    Raises
    ------
    RunFailed : when a rank fails or the time is up; the other ranks are ended.
    """
    with start_ranks(function, num_ranks, arguments, num_threads=num_threads) as ranks:
        return ranks.results(timeout_s=timeout_s, report=report)


@contextmanager
def start_ranks(
    function: str, num_ranks: int, arguments: Mapping[str, object], *, num_threads: int = 1, first_rank: int = 0
) -> Iterator[LocalRanks]:
    """Start ranks; on leaving the block they are told to stop, and ended when they do not."""
    with tempfile.TemporaryDirectory(prefix="stagewright-ranks-") as folder:
        ranks = LocalRanks(
            function, num_ranks, arguments, folder=folder, num_threads=num_threads, first_rank=first_rank
        )
        try:
            yield ranks
        finally:
            ranks.stop()


class LocalRanks:
    """Running rank processes; made by `start_ranks`."""

    def __init__(
        self,
        function: str,
        num_ranks: int,
        arguments: Mapping[str, object],
        *,
        folder: str,
        num_threads: int,
        first_rank: int,
    ) -> None:
        self._function = function
        self._folder = Path(folder)
        self._messages: queue.Queue[tuple[int, dict[str, object] | None]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(num_threads))}
        for index in range(num_ranks):
            request = {
                "function": function,
                "rank": first_rank + index,
                "num_ranks": num_ranks,
                "num_threads": num_threads,
                "rendezvous": f"file://{self._folder / 'rendezvous'}",
                "arguments": dict(arguments),
                "paths": [path for path in sys.path if path],
            }
            with (self._folder / f"stderr.{index}").open("w") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-m", "stagewright.profiler.ranks"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                )
            self._processes.append(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            threading.Thread(target=self._read, args=(index, process), daemon=True).start()

    def wait_until(self, phase: str, *, timeout_s: float = 60.0) -> None:
        """Return when every rank has reported `phase`; raises RunFailed when one ends before."""
        waiting = set(range(len(self._processes)))
        deadline = time.monotonic() + timeout_s
        while waiting:
            index, message = self._next(deadline)
            if message is None:
                raise self._failure(index)
            if message.get("progress") == phase:
                waiting.discard(index)

    def results(self, *, timeout_s: float, report: ReportsProgress | None = None) -> list[object]:
        """Return every rank's result; raises RunFailed for a rank that ends without one, or when the time is up."""
        results: dict[int, object] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) < len(self._processes):
            index, message = self._next(deadline)
            if message is None:
                if index not in results:
                    raise self._failure(index)
            elif "result" in message:
                results[index] = message["result"]
            elif report is not None and index == 0:
                report(str(message["progress"]), int(str(message["done"])), int(str(message["total"])))
        return [results[index] for index in range(len(self._processes))]

    def stop(self, *, patience_s: float = 3.0) -> None:
        """Close every rank's input, wait, and kill what is left."""
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError, OSError):
                assert process.stdin is not None
                process.stdin.close()
        deadline = time.monotonic() + patience_s
        for process in self._processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _read(self, index: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    self._messages.put((index, message))
        process.wait()
        self._messages.put((index, None))

    def _next(self, deadline: float) -> tuple[int, dict[str, object] | None]:
        try:
            return self._messages.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise RunFailed(f"{self._function}: {len(self._processes)} local ranks did not finish in time") from None

    def _failure(self, index: int) -> RunFailed:
        text = (self._folder / f"stderr.{index}").read_text(errors="replace").strip()
        last = text.splitlines()[-1] if text else "no message"
        code = self._processes[index].poll()
        return RunFailed(f"{self._function}: local rank {index} ended with exit code {code}: {last}")


def serve_rank() -> None:
    """Run the request on standard input as one rank."""
    request = json.loads(sys.stdin.readline())
    lines = sys.stdout
    sys.stdout = sys.stderr
    sys.path.extend(path for path in request["paths"] if path not in sys.path)
    stopped = threading.Event()
    threading.Thread(target=_watch_input, args=(stopped,), daemon=True).start()

    def send(message: Mapping[str, object]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    def report(phase: str, done: int, total: int) -> None:
        send({"progress": phase, "done": done, "total": total})

    module, name = request["function"].split(":")
    context = RankContext(request["rank"], request["num_ranks"], request["rendezvous"], report, stopped)
    send({"result": getattr(importlib.import_module(module), name)(context, **request["arguments"])})


def _watch_input(stopped: threading.Event) -> None:
    """End this rank when its parent is gone: politely first, at once when it does not listen."""
    sys.stdin.read()
    stopped.set()
    time.sleep(2.0)
    os._exit(0)


if __name__ == "__main__":
    serve_rank()
