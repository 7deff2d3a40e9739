"""Runs accepted plans in solver processes: a thread for each process, and one that watches the clock for all.

Deadlines are counted here, from acceptance, and not in the process. At the deadline, or at a cancel, the process is
asked to stop and to answer with the best it has; `stop_grace_s` later it is killed. A process that dies by itself, or
by another's hand, has its plan queued again, and a new process takes its place.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stagewright.api.lifecycle import Ending, Failure, State, StopReason, answered, stopped_empty
from stagewright.api.solver_process import ProcessDied, SolverProcess
from stagewright.api.store import PlanRow, Store
from stagewright.api.tasks import Answer, Refusal, Task, TaskFunction
from stagewright.planner.documents.outcome import PlanOutcome, Progress
from stagewright.planner.errors import Infeasible, NoIncumbent

_LOG = logging.getLogger(__name__)

_IDLE_S = 0.5
_POLL_S = 0.05
_LOOK_S = 0.5
_WATCH_S = 0.25
_START_S = 600.0
_RESTART_PAUSE_S = 0.3


@dataclass(frozen=True)
class DispatcherPolicy:
    """How many processes there are and how patient the server is with them."""

    workers: int
    stop_grace_s: float
    max_attempts: int
    lease_s: float
    memory_bytes: int | None = None
    prepare: Callable[[], None] | None = None


class Dispatcher:
    """Claims queued plans and runs each to its final state."""

    def __init__(
        self,
        store: Store,
        solve: TaskFunction,
        policy: DispatcherPolicy,
        *,
        on_change: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._solve = solve
        self._policy = policy
        self._on_change = on_change
        self._clock = clock
        self._boot_id = f"boot_{secrets.token_hex(8)}"
        self._bell = threading.Condition()
        self._stopping = threading.Event()
        self._num_ready = 0
        self._running: set[int] = set()
        self._nudged: set[str] = set()
        self._threads = [
            threading.Thread(target=self._work, name=f"solver-{index}", daemon=True) for index in range(policy.workers)
        ]
        self._threads.append(threading.Thread(target=self._watch, name="solver-watch", daemon=True))

    @property
    def num_ready(self) -> int:
        """Solver processes that can take a plan or run one."""
        return self._num_ready

    def start(self, *, is_alone: bool) -> None:
        """Queue again what a dead server left, then begin; `is_alone` says that no other server can be alive."""
        if is_alone:
            self._store.extend_queued()
        self._store.requeue_dead(lease_s=0.0 if is_alone else self._policy.lease_s)
        for thread in self._threads:
            thread.start()

    def ring(self) -> None:
        """Say that a plan was queued."""
        with self._bell:
            self._bell.notify()

    def nudge(self, plan_id: str) -> None:
        """Say that a running plan was asked to stop, so that it need not find out by itself."""
        self._nudged.add(plan_id)

    def stop(self) -> None:
        """Kill the solves, queue their plans again, and return when all is quiet."""
        self._stopping.set()
        with self._bell:
            self._bell.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _work(self) -> None:
        while not self._stopping.is_set():
            process: SolverProcess | None = None
            try:
                process = SolverProcess(prepare=self._policy.prepare, memory_bytes=self._policy.memory_bytes)
                if self._wait_ready(process):
                    self._serve(process)
            except ProcessDied as error:
                _LOG.warning("a solver process died: %s", error)
                self._stopping.wait(_RESTART_PAUSE_S)
            except Exception:
                _LOG.exception("a solver thread failed and begins again")
                self._stopping.wait(_RESTART_PAUSE_S)
            finally:
                if process is not None:
                    process.kill()

    def _wait_ready(self, process: SolverProcess) -> bool:
        end = time.monotonic() + _START_S
        while not self._stopping.is_set() and time.monotonic() < end:
            if process.wait_ready(_LOOK_S):
                return True
        return False

    def _serve(self, process: SolverProcess) -> None:
        """Run plans on one process until it has to be replaced."""
        with self._count_ready():
            while not self._stopping.is_set():
                row = self._store.claim(self._boot_id)
                if row is None:
                    with self._bell:
                        self._bell.wait(_IDLE_S)
                    process.next_reply(0.0)  # notices a process that died while idle
                elif not self._run(row, process):
                    return

    def _run(self, row: PlanRow, process: SolverProcess) -> bool:
        """Run one plan to its end; return whether the process can take another."""
        self._on_change(row.id)
        self._running.add(row.seq)
        try:
            return self._solve_row(row, process)
        except BaseException:
            self._give_back(row)
            raise
        finally:
            self._running.discard(row.seq)
            self._nudged.discard(row.id)

    def _solve_row(self, row: PlanRow, process: SolverProcess) -> bool:
        process.start(Task(self._solve, row.request, max(0.0, row.deadline_at - self._clock())))
        stop: StopReason | None = None
        kill_at = look_at = 0.0
        progress: Progress | None = None
        while not self._stopping.is_set():
            reply = process.next_reply(_POLL_S)
            if isinstance(reply, Answer | Refusal):
                self._finish(row, _ending(reply, stop))
                return isinstance(reply, Answer) or reply.kind != "internal"
            now = time.monotonic()
            if stop is not None and now >= kill_at:
                self._finish(row, stopped_empty(stop))
                return False
            progress = reply or progress
            if now < look_at and row.id not in self._nudged:
                continue
            look_at = now + _LOOK_S
            self._nudged.discard(row.id)
            current = self._look(row, progress)
            progress = None
            if current is None:
                return False
            wanted: StopReason | None = current.cancel_mode or ("deadline" if self._is_late(row) else None)
            if wanted == "discard":
                self._finish(row, stopped_empty("discard"))
                return self._ends_by_itself(process)
            if wanted is not None and stop is None:
                process.ask_to_stop()
                stop, kill_at = wanted, now + self._policy.stop_grace_s
        self._store.release(row, self._boot_id, refund=True)
        return False

    def _ends_by_itself(self, process: SolverProcess) -> bool:
        """Ask a solve whose answer nobody wants to end; return whether it did, so that its process can be kept."""
        process.ask_to_stop()
        end = time.monotonic() + self._policy.stop_grace_s
        while time.monotonic() < end and not self._stopping.is_set():
            if isinstance(process.next_reply(_POLL_S), Answer | Refusal):
                return True
        return False

    def _look(self, row: PlanRow, progress: Progress | None) -> PlanRow | None:
        """Store what is new of a running plan and return its row; None when another server has taken it over."""
        if progress is not None:
            current = self._store.report(row, self._boot_id, progress)
            self._on_change(row.id)
            return current
        current = self._store.get(row.id)
        owned = current is not None and current.state is State.RUNNING and current.boot_id == self._boot_id
        return current if owned else None

    def _is_late(self, row: PlanRow) -> bool:
        return self._clock() >= row.deadline_at

    def _finish(self, row: PlanRow, ending: Ending) -> None:
        if not self._store.finish(row, self._boot_id, ending):
            _LOG.warning("%s ended %s here after another server had taken it over", row.id, ending.state)
        self._on_change(row.id)

    def _give_back(self, row: PlanRow) -> None:
        """Queue a plan again whose process died, or end it when that would be in vain."""
        current = self._store.get(row.id)
        if current is not None and current.cancel_mode is not None:
            self._finish(row, stopped_empty(current.cancel_mode))
        elif row.attempt >= self._policy.max_attempts:
            died = Failure("solver-died", f"the solver's process died {row.attempt} times while it worked on this plan")
            self._finish(row, Ending(State.FAILED, None, None, died))
        else:
            self._store.release(row, self._boot_id, refund=False)
            self._on_change(row.id)
            self.ring()

    @contextmanager
    def _count_ready(self) -> Iterator[None]:
        with self._bell:
            self._num_ready += 1
        try:
            yield
        finally:
            with self._bell:
                self._num_ready -= 1

    def _watch(self) -> None:
        """Fail waiting plans whose deadline passed, renew this server's leases, and take over from dead servers."""
        renew_at = 0.0
        while not self._stopping.wait(_WATCH_S):
            try:
                for row in self._store.overdue():
                    self._store.finish_queued(row, stopped_empty("deadline"))
                    self._on_change(row.id)
                if time.monotonic() >= renew_at:
                    renew_at = time.monotonic() + self._policy.lease_s / 4
                    self._store.heartbeat(self._boot_id, sorted(self._running))
                    if self._store.requeue_dead(lease_s=self._policy.lease_s):
                        self.ring()
            except Exception:
                _LOG.exception("the watch over plans failed and begins again")


def _ending(reply: Answer | Refusal, stop: StopReason | None) -> Ending:
    if isinstance(reply, Answer):
        return answered(PlanOutcome.from_object(json.loads(reply.text)), stop)
    if reply.kind == NoIncumbent.kind:
        return stopped_empty(stop or "deadline")
    if stop == "discard":
        return stopped_empty(stop)
    if reply.traceback:
        _LOG.error("a solve failed: %s\n%s", reply.message, reply.traceback)
    state = State.INFEASIBLE if reply.kind == Infeasible.kind else State.FAILED
    return Ending(state, None, None, Failure(reply.kind, reply.message, reply.field, reply.hint))
