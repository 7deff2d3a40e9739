"""Compilation of what the search calls, at installation or in two processes at once on the very first run.

Compiled functions are cached on disk, so this matters once: `python -m stagewright.planner.compiling` does it now, which
`make` and the image do, and whoever has not done it waits for it in their first search. While this process prices, bounds and completes
candidates, a helper process plans a tiny model from the other end: it scores a candidate, proves a bound of it, then makes
an order of every schedule, which compiles the same functions, in another order, into the same cache.

A function is compiled by one of the two alone. Before a process compiles a function that the cache lacks, it takes the
lock of that function and looks again, so that the other one waits and then loads. Callers lock before what they call and
calls make no cycles, so no two wait for each other. Where locks cannot be had, both compile, and nothing else changes.
Both make machine code only for what Python calls (`machine_code`), by a shorter way (`front_end`).
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType
from typing import NoReturn, Protocol, cast

from stagewright.planner.cores import num_cores
from stagewright.planner.forks import end_fork, start_fork
from stagewright.planner.front_end import without_detours
from stagewright.planner.machine_code import for_what_python_calls

_LOCKED_BYTES = 2**31 - 1


class FunctionCache(Protocol):
    """What a compiled function keeps on disk, as numba calls it."""

    @property
    def cache_path(self) -> str:
        """Return the folder."""

    def load_overload(self, sig: object, target_context: object) -> object | None:
        """Return the compiled function for a signature; None when it is not there."""

    def save_overload(self, sig: object, data: object) -> None:
        """Keep a compiled function."""

    def enable(self) -> None:
        """Use the cache."""

    def disable(self) -> None:
        """Pass the cache by."""

    def flush(self) -> None:
        """Forget what the folder holds."""


class CompiledFunction(Protocol):
    """What of numba's dispatcher is touched here."""

    py_func: FunctionType
    _cache: FunctionCache


class Helper:
    """The other process: forked at the first function that the cache lacks, ended with this one's work.

    `work` is what it does, and `report` is told 0 at the start and 1 at the end. A fork has what this one has imported.
    """

    def __init__(self, work: Callable[[], None], report: Callable[[int], None]) -> None:
        self._work = work
        self._report = report
        self._process: int | None = None
        self._owner = os.getpid()

    def start(self) -> None:
        """Start the process, once; a fork of this one starts none."""
        if self._process is not None or os.getpid() != self._owner:
            return
        self._report(0)
        self._process = start_fork()
        if self._process == 0:
            self._work_and_leave()

    def end(self) -> None:
        """End the process, whatever it is at."""
        if self._process is not None:
            end_fork(self._process)
            self._report(1)

    def _work_and_leave(self) -> NoReturn:
        """Do the work in silence, and end without what this process would do at its end."""
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with Path(os.devnull).open("w") as nothing:
                for stream in (1, 2):
                    os.dup2(nothing.fileno(), stream)
                sys.stdout = sys.stderr = nothing
                self._work()
        finally:
            os._exit(0)


class SharedCache:
    """A function's cache, in which one process at a time looks for what it would compile otherwise."""

    def __init__(self, cache: FunctionCache, name: str, locks: int, helper: Helper | None) -> None:
        self._cache = cache
        self._place = zlib.crc32(name.encode()) % _LOCKED_BYTES
        self._locks = locks
        self._helper = helper

    @property
    def cache_path(self) -> str:
        return self._cache.cache_path

    def load_overload(self, sig: object, target_context: object) -> object | None:
        """Return the compiled function; None when this process is to compile it, and then it holds the lock."""
        found = self._cache.load_overload(sig, target_context)
        if found is not None:
            return found
        if self._helper is not None:
            self._helper.start()
        with suppress(OSError):
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, self._place)
        found = self._cache.load_overload(sig, target_context)
        if found is not None:
            self._unlock()
        return found

    def save_overload(self, sig: object, data: object) -> None:
        """Keep a compiled function, and let the other process go on."""
        try:
            self._cache.save_overload(sig, data)
        finally:
            self._unlock()

    def enable(self) -> None:
        self._cache.enable()

    def disable(self) -> None:
        self._cache.disable()

    def flush(self) -> None:
        self._cache.flush()

    def _unlock(self) -> None:
        with suppress(OSError):
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, self._place)


@contextmanager
def compiled_by_two(report: Callable[[int], None] = lambda done: None) -> Iterator[None]:
    """Let a helper process compile beside this one, should anything have to be compiled; on one core do it alone.

    `report` is told 0 when compilation begins and 1 when the work of this process is done, if it did.
    """
    with without_detours(), for_what_python_calls():
        if num_cores() < 2:
            yield
            return
        with tempfile.TemporaryFile() as locks:
            helper = Helper(_plan_from_the_end, report)
            shared = share_caches(locks.fileno(), helper)
            try:
                yield
            finally:
                for function, cache in shared:
                    function._cache = cache
                helper.end()


def share_caches(
    locks: int, helper: Helper | None, package: str = "stagewright.planner."
) -> list[tuple[CompiledFunction, FunctionCache]]:
    """Put the shared cache into every compiled function of a package; return what was there before."""
    from numba.core.dispatcher import Dispatcher

    import stagewright.planner.planning  # noqa: F401 (its imports are the functions)

    before: list[tuple[CompiledFunction, FunctionCache]] = []
    for module_name in sorted(name for name in sys.modules if name.startswith(package)):
        for function in vars(sys.modules[module_name]).values():
            if not isinstance(function, Dispatcher):
                continue
            compiled = cast(CompiledFunction, function)
            if not isinstance(compiled._cache, SharedCache):
                name = f"{compiled.py_func.__module__}.{compiled.py_func.__qualname__}"
                before.append((compiled, compiled._cache))
                compiled._cache = SharedCache(compiled._cache, name, locks, helper)
    return before


def _plan_from_the_end() -> None:
    """Score and close a candidate of a tiny problem: what a search comes to last, first."""
    import numpy as np

    from stagewright.planner.catalog.clusters import resolve_cluster
    from stagewright.planner.catalog.models import resolve_model
    from stagewright.planner.documents.job import TrainingJob
    from stagewright.planner.prediction import evaluate
    from stagewright.planner.search.branching import Branching
    from stagewright.planner.search.closing import Closer
    from stagewright.planner.search.cut_program import CutProgram
    from stagewright.planner.search.incumbent import Completion
    from stagewright.planner.search.joint_search import JointSearch
    from stagewright.planner.search.limits import Limits
    from stagewright.planner.search.order_reach import OrderReach
    from stagewright.planner.search.problem import Problem

    job = TrainingJob(global_batch=8, sequence_length=1024)
    problem = Problem(resolve_model("gpt2"), resolve_cluster("a100-sxm-80g:2x1"), job, 2)
    search = JointSearch.of(problem, Limits())
    of_rule: dict[str, int] = {}
    for index in range(search.space.num_candidates):
        if search.space.key(index).num_ranks == 2:
            of_rule.setdefault(search.space.rule(index).name, index)
    index = of_rule.pop("1f1b")
    costs = search.costs.of(index)
    assert costs is not None
    halves = (0, costs.num_layers // 2, costs.num_layers)
    counts = np.zeros((2, costs.classes.num_classes, 3), dtype=np.int64)
    counts[:, :, 0] = costs.layers_of(halves)
    step_s, cut = costs.trace(counts, halves)
    completion = Completion(step_s, halves, counts, cut)
    evaluate(
        problem.plan(search.space.candidate(index), search.completions.partition(index, completion), "exact"),
        problem.profile,
    )
    target_s = 2 * step_s
    reach = OrderReach(search.space, search.costs)
    reach.note_out_of_reach([index], target_s)
    _, rank_layers = reach.order_caps(index, target_s)
    closer = Closer(search.limits)
    closer.close_light(costs, step_s, rank_layers)
    program = CutProgram(costs, closer.of(costs.order).pool, form="whole", target_s=target_s, rank_layers=rank_layers)
    Branching(program, target_s, 0.0, lambda point, is_whole: None, lambda: False).run(most_nodes=1)
    for each in reversed(of_rule.values()):  # those first that begin with what others end with
        search.costs.of(each)
    closer.close(costs, target_s, target_s, rank_layers)


def compile_now() -> None:
    """Compile what searches call: by one whose proof takes all of its means, on a mixed cluster, and over branches side by side."""
    from stagewright.planner.catalog.clusters import resolve_cluster
    from stagewright.planner.catalog.models import resolve_model
    from stagewright.planner.documents.job import TrainingJob
    from stagewright.planner.planning import make_plan

    with compiled_by_two():
        for model, cluster, batch, length in (
            ("gpt3-175b", "a100-sxm-80g:8x8", 1536, 2048),
            ("gpt2", "a100-sxm-80g:2x1+v100-sxm-32g:2x1", 8, 1024),
            ("vit-l-llama3-8b", "h100-sxm:8x1", 64, 4096),
        ):
            job = TrainingJob(global_batch=batch, sequence_length=length)
            make_plan(resolve_model(model), resolve_cluster(cluster), job)


if __name__ == "__main__":
    compile_now()
