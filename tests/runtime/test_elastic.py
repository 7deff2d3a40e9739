"""A run that loses a rank goes on under a smaller plan, and its loss curve is that of a run that lost none."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
from runtime_documents import plan_of, profile_of
from runtime_models import build_wide

from stagewright.modeling import split
from stagewright.planner.documents import Degrees, ModelProfile, Plan
from stagewright.planner.errors import InvalidArgument, RankLost
from stagewright.runtime.elastic import next_plan, num_lost, run_elastic
from stagewright.runtime.run import run_plan
from stagewright.runtime.status import StatusFile
from stagewright.runtime.training import TrainingSettings, latest_step
from stagewright.testing.mocked_cluster import cluster_factory

pytestmark = pytest.mark.ranks

MODELS = Path(__file__).parent / "runtime_models.py"
MODEL, DATA = f"{MODELS}:build_wide", f"{MODELS}:data"


def _documents() -> tuple[Plan, Plan, ModelProfile]:
    """A plan on four devices, one on two for the same batch, and their profile."""
    chain = split(build_wide())
    profile = profile_of(chain)
    large = plan_of(chain, profile, "1f1b", 2, 4, degrees=Degrees(dp=2))
    return large, plan_of(chain, profile, "zb-h1", 2, 8), profile


class _Killer(threading.Thread):
    """Kills a rank when a checkpoint of at least `step` is complete."""

    def __init__(self, directory: Path, saved: Path, rank: int, step: int) -> None:
        super().__init__(daemon=True)
        self.directory, self.saved, self.rank, self.step = directory, saved, rank, step

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                if (latest_step(self.saved) or 0) >= self.step:
                    pid = StatusFile(self.directory / "status", 4).read(self.rank).pid
                    os.kill(pid, signal.SIGKILL)
                    return
            time.sleep(0.01)


def test_a_run_that_loses_a_rank_continues_on_fewer_devices_with_the_same_losses(tmp_path):
    large, small, profile = _documents()
    rules = {"learning_rate": 1e-2, "clip_norm": 0.5, "learning_rate_schedule": f"{MODELS}:halving"}
    whole = run_plan(
        small, profile, model=MODEL, data=DATA, steps=60, checks=(), training=TrainingSettings(**rules)
    )  # fmt: skip
    saved = tmp_path / "saved"
    _Killer(tmp_path / "run" / "attempt-0", saved, rank=3, step=8).start()
    report = run_elastic(
        large, [small], profile, model=MODEL, data=DATA, steps=60, checks=(), directory=tmp_path / "run",
        training=TrainingSettings(**rules, save=str(saved), save_every=4),
    )  # fmt: skip
    (restart,) = report.restarts
    assert restart["rank"] == 3 and restart["num_devices"] == 2
    assert 8 <= restart["continued_from_step"] < 62
    assert latest_step(saved) == 62
    assert report.first_step == whole.first_step == 2
    assert len(report.losses) == len(whole.losses) == 60
    assert whole.losses[-1] < 0.95 * whole.losses[0]
    assert report.losses == pytest.approx(whole.losses, rel=1e-5)


def test_without_a_plan_for_what_is_left_the_loss_ends_the_run():
    large, small, _ = _documents()
    assert num_lost(large, 3) == 1
    assert next_plan(large, [small], 3) is small
    assert next_plan(small, [small, large], 0) is None
    two_nodes = large.model_copy(update={"cluster": cluster_factory(2, 2)})
    assert num_lost(two_nodes, 1) == 2, "a node is lost whole"


def test_a_run_with_fallbacks_has_to_save_and_to_keep_its_batch():
    large, small, profile = _documents()
    common = {"model": MODEL, "data": DATA, "steps": 1, "checks": ()}
    with pytest.raises(InvalidArgument, match="has to save"):
        run_elastic(large, [small], profile, training=TrainingSettings(), **common)
    other = small.model_copy(update={"job": small.job.model_copy(update={"global_batch": 3})})
    with pytest.raises(InvalidArgument, match="fallback 0 trains on 3 samples a step, the plan on 16"):
        run_elastic(large, [other], profile, training=TrainingSettings(save="x", save_every=1), **common)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": -1.0}, "clip_norm is -1, it must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"save_every": 5}, "there is no directory to save in"),
        ({"load": "nowhere"}, "nowhere holds no checkpoint"),
    ],
)
def test_training_settings_out_of_range_are_refused_before_any_rank_starts(settings, message):
    with pytest.raises(InvalidArgument, match=message):
        TrainingSettings(**settings)


def test_a_lost_rank_is_a_failed_run_for_those_who_do_not_continue():
    assert RankLost("rank 1 died", rank=1).kind == "run-failed"
