"""A pool of gloo ranks that live as long as the test session and run one case after another.

Starting a rank costs seconds, a case a fraction of one: all cases of a world size share its ranks. A case that fails on
one rank leaves the others waiting: then, and after a timeout, the pool is ended and the next case gets a new one. Where
every rank refuses a case in the same words, all are ready for the next.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

REFUSAL_S = 3.0  # for which the other ranks are waited for when one has raised
START_S = 500.0  # for which ranks may start and join: eight of them on a busy machine take minutes
PRELOADED = ["torch", "torch.distributed", "torch.distributed.tensor.parallel", "runtime_cases"]


class RankPool:
    """`run(function, argument)` calls a function on each rank with the argument and returns their results.

    A function of another module than `runtime_cases` is named `module.function`.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._number = 0

    def run(self, function: str, argument: object, *, timeout_s: float = 300.0) -> list[Any]:
        if not self._processes:
            self._start()
            self._results("the start", timeout_s=START_S)
        for pipe in self._pipes:
            pipe.send((function, argument))
        return self._results(f"{function}({argument})", timeout_s=timeout_s)

    def _results(self, what: str, *, timeout_s: float) -> list[Any]:
        """Return what every rank answers; raises for a rank that raised, died or does not answer."""
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(results) + len(errors) < self.num_ranks:
            waiting = {pipe: index for index, pipe in enumerate(self._pipes) if index not in {*results, *errors}}
            ready = wait(list(waiting), timeout=REFUSAL_S if errors else timeout_s)
            if not ready and errors:
                break
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {self.num_ranks} hang in {what}")
            for pipe in ready:
                index = waiting[pipe]
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    kind, value = "error", f"rank {index} died"
                (errors if kind == "error" else results)[index] = value
        if errors:
            refusals = {value.strip().splitlines()[-1] for value in errors.values()}
            if len(errors) < self.num_ranks or len(refusals) > 1 or any("died" in value for value in refusals):
                self.close()
            index, value = min(errors.items(), key=lambda item: ("Connection" in item[1], item[0]))
            raise RankError(f"rank {index} of {self.num_ranks}: {value}")
        return [results[index] for index in range(self.num_ranks)]

    def next_number(self) -> int:
        """Return a number no other case of this pool has, for the keys it puts in the store."""
        self._number += 1
        return self._number

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        here = str(Path(__file__).parent)
        if here not in sys.path:
            sys.path.insert(0, here)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = 0
        for rank in range(self.num_ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.num_ranks, port, theirs, here), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)
            if rank == 0:
                port = self._port()

    def _port(self) -> int:
        """Return the port on which rank 0 listens, which it took itself: one found free here might be another's by then."""
        try:
            if self._pipes[0].poll(START_S):
                return int(self._pipes[0].recv())
        except EOFError:
            pass
        self.close()
        raise RankError(f"rank 0 of {self.num_ranks} does not start")


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


def _serve(rank: int, num_ranks: int, port: int, pipe: Connection, path: str) -> None:
    if path not in sys.path:
        sys.path.insert(0, path)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    started = timedelta(seconds=START_S)
    store = dist.TCPStore("127.0.0.1", port, num_ranks, rank == 0, started, wait_for_workers=False)
    if rank == 0:
        pipe.send(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=started)
    dist.barrier()
    pipe.send(("result", None))
    while True:
        try:
            function, argument = pipe.recv()
        except EOFError:
            return
        try:
            module, _, name = function.rpartition(".")
            pipe.send(("result", getattr(importlib.import_module(module or "runtime_cases"), name)(argument)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
