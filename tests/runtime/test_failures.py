"""A rank that is killed, stopped or raises ends the whole run in seconds, with one error that names it; nothing is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
from runtime_documents import plan_of, profile_of
from runtime_models import TinyModel

from stagewright.modeling import split
from stagewright.planner.errors import InvalidDocument, RunFailed
from stagewright.runtime.run import run_plan
from stagewright.runtime.status import StatusFile

pytestmark = pytest.mark.ranks

MODEL = f"{Path(__file__).parent / 'runtime_models.py'}:build"
DATA = f"{Path(__file__).parent / 'runtime_models.py'}:data"
NUM_RANKS = 2


def documents():
    chain = split(TinyModel(3))
    profile = profile_of(chain)
    return plan_of(chain, profile, "1f1b", NUM_RANKS, 4), profile


class Disturber(threading.Thread):
    """Sends a signal to one rank some time after its training began, and keeps every rank's process id."""

    def __init__(self, directory: Path, rank: int, delay_s: float, what: signal.Signals) -> None:
        super().__init__(daemon=True)
        self.directory, self.rank, self.delay_s, self.what = directory, rank, delay_s, what
        self.pids: list[int] = []
        self.sent_at = 0.0

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                status = StatusFile(self.directory / "status", NUM_RANKS)
                self.pids = [status.read(rank).pid for rank in range(NUM_RANKS)]
                if status.read(self.rank).phase == "training":
                    break
            time.sleep(0.02)
        time.sleep(self.delay_s)
        self.sent_at = time.monotonic()
        os.kill(self.pids[self.rank], self.what)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def disturb(tmp_path: Path, rank: int, delay_s: float, what: signal.Signals) -> tuple[RunFailed, float]:
    """Run, disturb one rank, and return the error and how long the end took; no rank may be left."""
    plan, profile = documents()
    disturber = Disturber(tmp_path, rank, delay_s, what)
    disturber.start()
    with pytest.raises(RunFailed) as raised:
        run_plan(plan, profile, model=MODEL, data=DATA, steps=100_000, checks=(), directory=tmp_path)
    seconds = time.monotonic() - disturber.sent_at
    assert not [pid for pid in disturber.pids if is_alive(pid)]
    return raised.value, seconds


def kill_and_check(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    rank = source.randrange(NUM_RANKS)
    error, seconds = disturb(tmp_path, rank, source.uniform(0.0, 0.5), signal.SIGKILL)
    assert seconds < 10.0
    assert error.message.startswith(f"rank {rank} (stage {rank}, action "), error.message
    assert "died" in error.message


@pytest.mark.parametrize("seed", range(3))
def test_killing_a_rank_ends_every_process_within_ten_seconds(tmp_path, seed):
    kill_and_check(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_killing_a_rank_ends_every_process_within_ten_seconds_twenty_times(tmp_path, seed):
    kill_and_check(tmp_path, 100 + seed)


def test_a_stopped_rank_is_noticed_by_its_silence(tmp_path):
    error, seconds = disturb(tmp_path, 1, 0.1, signal.SIGSTOP)
    assert seconds < 15.0
    assert error.message.startswith("rank 1 (stage 1, action ")
    assert "no sign of life" in error.message


def test_a_rank_that_raises_ends_the_run_with_its_message(tmp_path):
    plan, profile = documents()
    with pytest.raises(RunFailed, match=r"rank 1 \(stage 1, action 1F0 of step 0\): ValueError: broken on purpose"):
        run_plan(plan, profile, model=MODEL.replace(":build", ":broken"), data=DATA, steps=1, checks=())


def test_a_plan_for_other_layers_is_refused(tmp_path):
    plan, profile = documents()
    with pytest.raises(InvalidDocument, match=r"has layers sha256:.*, the profile sha256:"):
        run_plan(plan, profile, model=MODEL.replace(":build", ":longer"), data=DATA, steps=1, checks=())
