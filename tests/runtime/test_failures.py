"""A rank that is killed, stopped, cut off or raises ends the run in seconds, with one error that names it; nothing is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
from runtime_documents import plan_of, profile_of
from runtime_models import TinyModel

from stagewright.modeling import split
from stagewright.planner.errors import InvalidDocument, RunFailed
from stagewright.runtime.launch import error_of
from stagewright.runtime.run import run_plan
from stagewright.runtime.status import StatusFile

pytestmark = pytest.mark.ranks

MODEL = f"{Path(__file__).parent / 'runtime_models.py'}:build"
DATA = f"{Path(__file__).parent / 'runtime_models.py'}:data"
NUM_RANKS = 2


def test_a_rank_that_ended_without_a_report_is_told_of_by_its_own_last_words(tmp_path):
    log = tmp_path / "ranks.log"
    own = "terminate called without an active exception"
    report = [
        "E1128 [...]/torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -6)",
        "Traceback",
        "=====",
    ]
    log.write_text("\n".join([own, *report]))
    assert error_of(None, 1, -6, log).message == f"rank 1 ended with exit code -6: {own}"
    log.write_text("\n".join(report))
    assert error_of(None, 1, -6, log).message.endswith(": =====")
    assert error_of(None, 1, -6, tmp_path / "none").message.endswith(": no output")


def documents(num_ranks: int = NUM_RANKS):
    chain = split(TinyModel(3))
    profile = profile_of(chain)
    return plan_of(chain, profile, "1f1b", num_ranks, 4), profile


BUSY_S = 60.0
CUT = "cut"  # all connections of the rank are closed


class Disturber(threading.Thread):
    """Disturbs one rank some time after its training began, and keeps every rank's process id.

    Meanwhile `num_busy` other processes want the processors, from the training's begin on, for `BUSY_S` at most.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        delay_s: float,
        what: signal.Signals | str,
        *,
        num_ranks: int = NUM_RANKS,
        num_busy: int = 0,
    ) -> None:
        super().__init__(daemon=True)
        self.directory, self.rank, self.delay_s, self.what = directory, rank, delay_s, what
        self.num_ranks, self.num_busy = num_ranks, num_busy
        self.pids: list[int] = []
        self.busy: list[subprocess.Popen[bytes]] = []
        self.sent_at = 0.0

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                status = StatusFile(self.directory / "status", self.num_ranks)
                self.pids = [status.read(rank).pid for rank in range(self.num_ranks)]
                if status.read(self.rank).phase == "training":
                    break
            time.sleep(0.02)
        program = f"import time\nend = time.monotonic() + {BUSY_S}\nwhile time.monotonic() < end: pass"
        self.busy = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(self.num_busy)]
        time.sleep(self.delay_s)
        self.sent_at = time.monotonic()
        if self.what == CUT:
            (self.directory / "cut").write_text(str(self.rank))
        else:
            os.kill(self.pids[self.rank], self.what)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def disturb(folder: Path, rank: int, delay_s: float, what: signal.Signals | str) -> tuple[RunFailed, float]:
    """Run, disturb one rank, and return the error and how long the end took; no rank may be left."""
    plan, profile = documents()
    disturber = Disturber(folder, rank, delay_s, what)
    disturber.start()
    model = MODEL.replace(":build", ":build_to_cut") if what == CUT else MODEL
    with pytest.raises(RunFailed) as raised:
        run_plan(plan, profile, model=model, data=DATA, steps=100_000, checks=(), directory=folder)
    seconds = time.monotonic() - disturber.sent_at
    assert not [pid for pid in disturber.pids if is_alive(pid)]
    return raised.value, seconds


COLLECTIVE_S = 600.0  # after which a collective without its peers gives up
LIMITS_S = {signal.SIGKILL: 10.0, signal.SIGSTOP: 15.0, CUT: 15.0}
FAULTS = {signal.SIGKILL: "died", signal.SIGSTOP: "no sign of life", CUT: "cut off"}


def disturb_and_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, what: signal.Signals | str, limit_s: float
) -> None:
    source = random.Random(seed)
    rank = source.randrange(NUM_RANKS)
    monkeypatch.setenv("CUT_FILE", str(folder / "cut"))
    error, seconds = disturb(folder, rank, source.uniform(0.0, 0.5), what)
    assert seconds < limit_s
    assert error.message.startswith(f"rank {rank} (stage {rank}, action "), error.message
    assert FAULTS[what] in error.message


@pytest.mark.parametrize(
    ("seed", "what"),
    [
        (0, signal.SIGKILL),
        (1, signal.SIGSTOP),
        (3, CUT),
        *(pytest.param(seed, signal.SIGKILL, marks=pytest.mark.soak) for seed in (2, 4)),
    ],
)
def test_a_killed_stopped_or_cut_rank_ends_every_process_long_before_a_collective_gives_up(
    tmp_path, monkeypatch, seed, what
):
    disturb_and_check(tmp_path, monkeypatch, seed, what, COLLECTIVE_S / 5)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(60))
def test_any_rank_at_any_action_ends_every_process_within_ten_seconds_of_a_kill_and_fifteen_of_a_stop_or_cut(
    tmp_path, monkeypatch, seed
):
    what = [*FAULTS][seed % 3]
    disturb_and_check(tmp_path, monkeypatch, 100 + seed, what, LIMITS_S[what])


@pytest.mark.soak
def test_at_a_load_of_fifty_no_living_rank_is_called_lost_and_a_stopped_one_is_named(tmp_path):
    """Four ranks share two processors with fifty busy processes for twenty seconds, then one of the ranks is stopped."""
    plan, profile = documents(4)
    disturber = Disturber(tmp_path, 2, 20.0, signal.SIGSTOP, num_ranks=4, num_busy=50)
    disturber.start()
    try:
        with pytest.raises(RunFailed) as raised:
            run_plan(plan, profile, model=MODEL, data=DATA, steps=100_000, checks=(), directory=tmp_path)
        seconds = time.monotonic() - disturber.sent_at
        assert disturber.sent_at, f"before any rank was stopped: {raised.value.message}"
        assert raised.value.message.startswith("rank 2 (stage 2, action "), raised.value.message
        assert "no sign of life" in raised.value.message
        assert seconds < LIMITS_S[signal.SIGSTOP]
        assert not [pid for pid in disturber.pids if is_alive(pid)]
    finally:
        for process in disturber.busy:
            process.kill()
            process.wait()


def test_a_rank_that_raises_ends_the_run_with_its_message(tmp_path):
    plan, profile = documents()
    with pytest.raises(RunFailed, match=r"rank 1 \(stage 1, action 1F0 of step 0\): ValueError: broken on purpose"):
        run_plan(plan, profile, model=MODEL.replace(":build", ":broken"), data=DATA, steps=1, checks=())


def test_a_plan_for_other_layers_is_refused_before_a_rank_starts(monkeypatch):
    monkeypatch.setattr("stagewright.runtime.run.launch", lambda *_, **__: pytest.fail("ranks were started"))
    plan, profile = documents()
    with pytest.raises(InvalidDocument, match=r"has layers sha256:.*, the profile sha256:"):
        run_plan(plan, profile, model=MODEL.replace(":build", ":longer"), data=DATA, steps=1, checks=())
