"""Starting the ranks of a run under torchrun, watching them, and ending every one of them when one fails.

The launcher imports no torch. It starts `python -m torch.distributed.run` in a session of its own, reads the run's log
for progress, and looks for reports of failure, for dead ranks and at torchrun itself. On the first failure it waits a
moment for the reports of the others, ends every process of the run by its id, and raises one error for the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from stagewright.planner import errors
from stagewright.planner.errors import RankLost, RunFailed, StagewrightError
from stagewright.runtime.failure import DIED, LOST, OWN, SILENT, RankFailure, first_cause, load_failures, now
from stagewright.runtime.job import RunJob
from stagewright.runtime.rescue import has_rescued
from stagewright.runtime.status import StatusFile

Progress = Callable[[str, int, int], None]

_TORCHRUN = "torch/distributed/elastic/multiprocessing/api.py"  # in the first line of torchrun's report of a failure
_LOOK_S = 0.25  # between two looks at a run, which take time from its ranks where they have every core
_POLL_S = 0.05
_SETTLE_S = 2.5
_RESCUE_S = 8.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def launch(
    job: RunJob,
    num_ranks: int,
    *,
    torchrun_arguments: Sequence[str] = (),
    describe: Callable[[int, int, int], str],
    progress: Progress | None = None,
) -> None:
    """Run the job's ranks to their end.

    Raises
    ------
    StagewrightError : what the failing rank raised, or RunFailed naming its stage and action; no process is left.
    """
    status = StatusFile.create(job.path / "status", num_ranks)
    log = (job.path / "ranks.log").open("wb")
    process = subprocess.Popen(
        _command(job, num_ranks, torchrun_arguments),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=rank_environment(job),
        cwd=job.working_directory,
        start_new_session=True,
    )
    watch = _Watch(job, status, describe)
    try:
        while process.poll() is None:
            watch.forward_events(progress)
            if watch.has_failed():
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_S)
        watch.forward_events(progress)
        if process.poll() != 0:
            watch.settle(process, rescue=job.rescue)
            raise watch.error(process)
    finally:
        _end(process, status)
        log.close()
        status.close()


def rank_environment(job: RunJob) -> dict[str, str]:
    """Return the environment of a rank's process."""
    return {**os.environ, **dict.fromkeys(_THREADS, str(job.num_threads)), "KINETO_LOG_LEVEL": "99"}


def error_of(failure: RankFailure | None, rank: int, exit_code: int, log: Path) -> StagewrightError:
    """Return the error that a rank's report tells of; without a report, what its output ends with."""
    hint = f"the output is in {log}"
    if failure is None:
        return RunFailed(f"rank {rank} ended with exit code {exit_code}: {_last_words(log)}", hint=hint)
    known = _known_error(failure)
    if known is not None:
        return known
    place = f" ({failure.place})" if failure.place else ""
    return RunFailed(f"rank {failure.rank}{place}: {failure.message}", hint=hint)


def _known_error(failure: RankFailure) -> StagewrightError | None:
    """Return the error of the kind that the failure names, unless it is a failed run."""
    if failure.kind == RunFailed.kind:
        return None
    for candidate in vars(errors).values():
        if isinstance(candidate, type) and issubclass(candidate, StagewrightError) and candidate.kind == failure.kind:
            return candidate(failure.message, field=failure.field, hint=failure.hint)
    return None


def _command(job: RunJob, num_ranks: int, torchrun_arguments: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run"]
    told = {argument.split("=")[0].lstrip("-").replace("_", "-") for argument in torchrun_arguments}
    if not told & {"standalone", "rdzv-endpoint", "master-addr", "nnodes", "rdzv-backend"}:
        command += ["--standalone", "--nnodes=1"]
    if "nproc-per-node" not in told:
        command.append(f"--nproc-per-node={num_ranks}")
    return [
        *command,
        "--max-restarts=0",
        *torchrun_arguments,
        "-m",
        "stagewright.runtime.rank",
        str(job.path / "job.json"),
    ]


class _Watch:
    """Looks for failures and for news."""

    def __init__(self, job: RunJob, status: StatusFile, describe: Callable[[int, int, int], str]) -> None:
        self._directory = job.path
        self._status = status
        self._describe = describe
        self._dead: dict[int, RankFailure] = {}
        self._read = 0

    def forward_events(self, progress: Progress | None) -> None:
        """Tell `progress` the new lines of the run's log."""
        path = self._directory / "events.jsonl"
        if progress is None or not path.exists():
            return
        with path.open() as stream:
            stream.seek(self._read)
            for line in iter(stream.readline, ""):
                if not line.endswith("\n"):
                    break
                self._read = stream.tell()
                event = json.loads(line)
                progress(str(event.get("phase", "training")), int(event["done"]), int(event["total"]))

    def has_failed(self) -> bool:
        """Whether a rank has reported a failure, or died without a word."""
        for rank in range(self._status.num_ranks):
            here = self._status.read(rank)
            if here.pid and rank not in self._dead and here.phase != "done" and not _is_rank(here.pid):
                place = self._describe(rank, here.step, here.position) or f"while {here.phase}"
                self._dead[rank] = RankFailure(
                    rank, DIED, place, "died without a word (killed, or cut off from its peers)", time_s=now()
                )
        return bool(self._dead) or next(self._directory.glob("failure.*.json"), None) is not None

    def settle(self, process: subprocess.Popen[bytes], *, rescue: bool) -> None:
        """Give the other ranks a moment to say what they saw; which rank died is known by now.

        With `rescue` and a rank lost, tell the others, and wait for what they hold.
        """
        self.has_failed()
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(_POLL_S)
        if not rescue or any(failure.cause == OWN for failure in load_failures(self._directory).values()):
            return
        (self._directory / LOST).touch()
        deadline = time.monotonic() + _RESCUE_S
        while time.monotonic() < deadline and any(map(self._is_rescuing, range(self._status.num_ranks))):
            time.sleep(_POLL_S)

    def _is_rescuing(self, rank: int) -> bool:
        """Whether a rank lives that is not lost itself and has not written what it holds."""
        lost = {failure.rank for failure in load_failures(self._directory).values() if failure.cause == SILENT}
        pid = self._status.read(rank).pid
        return rank not in lost and not has_rescued(self._directory, rank) and bool(pid) and _is_rank(pid)

    def error(self, process: subprocess.Popen[bytes]) -> StagewrightError:
        """Return the error of the rank that is the cause."""
        reported = load_failures(self._directory)
        silent = [failure for rank, failure in self._dead.items() if rank not in reported]
        if not reported and not silent:
            return RunFailed(
                f"torchrun ended with exit code {process.poll()}: {_last_words(self._directory / 'ranks.log')}",
                hint=f"the ranks' output is in {self._directory / 'ranks.log'}",
            )
        cause = first_cause([*reported.values(), *silent])
        known = _known_error(cause)
        if known is not None:
            return known
        here = self._status.read(cause.rank)
        seen = self._describe(cause.rank, here.step, here.position) if cause.cause == SILENT and here.pid else ""
        place = f" ({seen or cause.place})" if seen or cause.place else ""
        message, hint = (
            f"rank {cause.rank}{place}: {cause.message}",
            f"the output is in {self._directory / 'ranks.log'}",
        )
        return RunFailed(message, hint=hint) if cause.cause == OWN else RankLost(message, rank=cause.rank, hint=hint)


def _end(process: subprocess.Popen[bytes], status: StatusFile) -> None:
    """End torchrun and every rank by process id; a stopped process is ended too."""
    pids = [status.read(rank).pid for rank in range(status.num_ranks)]
    alive = [pid for pid in pids if pid and _is_rank(pid)]
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        process.wait(_SETTLE_S if alive else 0.0)  # torchrun, alive, collects what its ranks leave
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 5.0
    while any(_is_rank(pid) for pid in alive) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _is_rank(pid: int) -> bool:
    """Whether a process is a live rank of ours: its id may have been given to another since."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return b"stagewright.runtime.rank" in words and state != "Z"


def _last_words(path: Path) -> str:
    """Return the last line that a rank wrote, before torchrun's own report of its end."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    own = list(takewhile(lambda line: _TORCHRUN not in line, lines))
    return (own or lines or ["no output"])[-1]
