"""Signs of life: a rank that stops, dies or is cut off ends the run everywhere within seconds.

Each rank's beating thread sets its key in the store every half second, so a stopped process, a dead host and a cut
network all look alike: no new beat. Rank 0 watches all ranks and publishes a loss; every rank watches that notice, rank 0
itself, its parent and the launcher. The length of an action means nothing: a slow one beats on.

A machine under load may hold a beat back. A silent process that is known to be stopped or gone, because it was on this
machine, is lost after STOPPED_AFTER_S; any other has until SILENT_AFTER_S. A rank whose own connections are closed notices
by itself.

Whoever notices a loss writes a report and ends its process at once; collectives under way end with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from stagewright.runtime.failure import LOST, SILENT, RankFailure, now
from stagewright.runtime.status import StatusFile

BEAT_S = 0.5
STOPPED_AFTER_S = 5.0
SILENT_AFTER_S = 10.0
STARTUP_S = 120.0
CUT_OFF = "was cut off: the store cannot be reached"


class Liveness:
    """Beats for this rank and watches the others; started once, ends with the process.

    Parameters
    ----------
    describe : what a rank is doing, given its (step, position), in words.
    before_end : called when another rank is lost, before this process ends.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        status: StatusFile,
        directory: Path,
        *,
        launcher: int,
        describe: Callable[[int, int, int], str],
        address: tuple[str, int],
        before_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._status = status
        self._directory = directory
        self._launcher = launcher
        self._describe = describe
        self._before_end = before_end
        self._parent = os.getppid()
        self._host = socket.gethostname()
        self._stopped = threading.Event()
        self._stores = [
            dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
            for _ in range(2)
        ]

    def start(self) -> None:
        """Start the threads."""
        for target in (self._beat, self._watch, self._watch_processes):
            threading.Thread(target=target, daemon=True, name=f"stagewright-{target.__name__}").start()

    def stop(self) -> None:
        """Say goodbye: the end of this process is from now on no loss."""
        self._stopped.set()
        self._stores[0].set(f"beat/{self._rank}", "done")

    def _beat(self) -> None:
        beats = 0
        while not self._stopped.wait(BEAT_S):
            beats += 1
            self._status.beat(self._rank, beats)
            here = self._status.read(self._rank)
            try:
                self._stores[0].set(
                    f"beat/{self._rank}", json.dumps([beats, here.step, here.position, self._host, os.getpid()])
                )
            except RuntimeError:
                self._end(RankFailure(self._rank, SILENT, "", CUT_OFF, time_s=now()))

    def _watch(self) -> None:
        store = self._stores[1]
        watched = [rank for rank in (range(self._num_ranks) if self._rank == 0 else (0,)) if rank != self._rank]
        seen: dict[int, tuple[bytes, float]] = {}
        last_round = time.monotonic()
        while not self._stopped.wait(BEAT_S):
            try:
                if store.check(["lost"]):
                    self._end(RankFailure(**json.loads(store.get("lost"))))
                beats = {rank: store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b"" for rank in watched}
            except RuntimeError:
                self._end(RankFailure(self._rank, SILENT, "", CUT_OFF, time_s=now()))
            moment = time.monotonic()
            paused = moment - last_round > STOPPED_AFTER_S / 2  # this very process was stopped: nobody else is to blame
            last_round = moment
            for rank, beat in beats.items():
                if beat == b"done" or rank not in seen or seen[rank][0] != beat or paused:
                    seen[rank] = (beat, moment)
                elif moment - seen[rank][1] > (limit_s := silence_limit_s(beat, self._host)):
                    failure = self._lost(rank, beat, limit_s)
                    if self._rank == 0:
                        store.set("lost", json.dumps(vars(failure)))
                    self._end(failure)

    def _lost(self, rank: int, beat: bytes, limit_s: float) -> RankFailure:
        place = ""
        if beat:
            _, step, position, _, _ = json.loads(beat)
            place = self._describe(rank, step, position)
        return RankFailure(
            rank,
            SILENT,
            place,
            f"gave no sign of life for {limit_s:g} s (killed, stopped or cut off)",
            time_s=now(),
        )

    def _watch_processes(self) -> None:
        """End when the parent or the launcher is gone: no rank outlives them; or when the launcher tells of a lost rank."""
        while not self._stopped.wait(BEAT_S):
            if (self._directory / LOST).exists():
                self._before_end()
                os._exit(1)
            if os.getppid() != self._parent or not _is_alive(self._launcher):
                os._exit(1)

    def _end(self, failure: RankFailure) -> None:
        if not self._stopped.is_set():
            if failure.rank != self._rank:
                self._before_end()
            failure.save(self._directory, self._rank)
            os._exit(1)


def silence_limit_s(beat: bytes, host: str) -> float:
    """Return how long a rank may be silent after its last beat, as seen on `host`; before the first, STARTUP_S."""
    if not beat:
        return STARTUP_S
    *_, its_host, pid = json.loads(beat)
    return STOPPED_AFTER_S if its_host == host and _is_at_rest(pid) else SILENT_AFTER_S


def _is_at_rest(pid: int) -> bool:
    """Whether a process is stopped, traced, a zombie or gone; False where the system does not tell."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return not _is_alive(pid)
    return state in "TtZX"


def end_on_sigterm(status: StatusFile, rank: int, before_end: Callable[[], None]) -> None:
    """End, from any state, when the process is asked to; must be called before other threads start.

    The status then tells a rank that was ended because of another from one that died.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        before_end()
        status.enter(rank, "done")
        os._exit(143)

    threading.Thread(target=wait, daemon=True, name="stagewright-sigterm").start()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
