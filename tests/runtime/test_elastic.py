"""A run that loses a rank goes on under a smaller plan, and its loss curve is that of a run that lost none."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
from runtime_documents import plan_of, profile_of
from runtime_models import build_wide, data, halving

from stagewright.modeling import split
from stagewright.planner.documents import Degrees, ModelProfile, Plan
from stagewright.planner.errors import InvalidArgument, RankLost
from stagewright.runtime.elastic import next_plan, num_lost, run_elastic
from stagewright.runtime.optimizers import OptimizerChoice
from stagewright.runtime.reference import run_reference
from stagewright.runtime.rescue import complete_rescue, is_rescuable, owners, rescue_folder, rescued_step
from stagewright.runtime.status import StatusFile
from stagewright.runtime.training import TrainingSettings, latest_step
from stagewright.testing.mocked_cluster import cluster_factory

pytestmark = pytest.mark.ranks

MODELS = Path(__file__).parent / "runtime_models.py"
MODEL, DATA = f"{MODELS}:build_wide", f"{MODELS}:data"


def _documents(zero: int = 0) -> tuple[Plan, Plan, ModelProfile]:
    """A plan on four devices, one on two for the same batch, and their profile."""
    chain = split(build_wide())
    profile = profile_of(chain)
    large = plan_of(chain, profile, "1f1b", 2, 4, degrees=Degrees(dp=2, zero=zero))
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


RULES = {"learning_rate": 1e-2, "clip_norm": 0.5, "learning_rate_schedule": f"{MODELS}:halving"}
STEPS, WARM_UP = 30, 2


@pytest.fixture(scope="module")
def losses_of_one_process() -> tuple[float, ...]:
    """The losses of the timed steps, which the steps of the warm-up precede."""
    _, small, _ = _documents()
    batches = list(islice(data(small.job.global_batch, small.job.sequence_length), WARM_UP + STEPS))
    torch.manual_seed(0)
    run = run_reference(
        split(build_wide()),
        batches,
        microbatch=small.schedule.microbatch,
        seed=0,
        device=torch.device("cpu"),
        optimizer=OptimizerChoice("adamw", RULES["learning_rate"]),
        clip_norm=RULES["clip_norm"],
        learning_rate_factor=halving,
    )
    assert run.losses[-1] < 0.95 * run.losses[WARM_UP]
    return run.losses[WARM_UP:]


def test_a_run_that_loses_a_rank_goes_on_from_surviving_replicas_with_the_losses_of_one_process(
    tmp_path, monkeypatch, losses_of_one_process
):
    large, small, profile = _documents()
    # Rank 0 dies in the last of the step's four forwards, when it has had gradients of the first from the next stage.
    step = 9
    forwards = {"DIES_ON_RANK": "0", "DIES_IN_FORWARD": str(4 * step + 4), "DIES_FILE": str(tmp_path / "died")}
    for name, value in forwards.items():
        monkeypatch.setenv(name, value)
    report = run_elastic(
        large, [small], profile, model=f"{MODELS}:build_to_die", data=DATA, steps=STEPS, checks=(),
        directory=tmp_path / "run", training=TrainingSettings(**RULES, save=str(tmp_path / "saved"), save_every=1000),
    )  # fmt: skip
    (restart,) = report.restarts
    assert restart["rank"] == 0 and restart["num_devices"] == 2
    assert restart["continued_from"] == "replicas" and restart["continued_from_step"] == step
    assert report.first_step == WARM_UP and latest_step(tmp_path / "saved") == WARM_UP + STEPS
    assert report.losses == pytest.approx(losses_of_one_process, rel=1e-5)


@pytest.mark.soak
def test_a_run_whose_states_are_divided_goes_on_from_its_checkpoint_with_the_same_losses(
    tmp_path, losses_of_one_process
):
    large, small, profile = _documents(zero=1)
    saved = tmp_path / "saved"
    _Killer(tmp_path / "run" / "attempt-0", saved, rank=3, step=8).start()
    report = run_elastic(
        large, [small], profile, model=MODEL, data=DATA, steps=STEPS, checks=(), directory=tmp_path / "run",
        training=TrainingSettings(**RULES, save=str(saved), save_every=4),
    )  # fmt: skip
    (restart,) = report.restarts
    assert restart["rank"] == 3 and restart["num_devices"] == 2
    assert restart["continued_from"] == "checkpoint" and 8 <= restart["continued_from_step"] < STEPS + WARM_UP
    assert latest_step(saved) == STEPS + WARM_UP
    assert report.losses == pytest.approx(losses_of_one_process, rel=1e-5)


def _leave(folder: Path, rank: int, stages: dict[int, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    note = {"stages": stages, "weights": {f"weight-{stage}": count for stage, count in stages.items()}}
    (folder / f"rank-{rank}.json").write_text(json.dumps(note))


def test_survivors_are_gone_on_from_where_they_hold_every_stage_after_the_same_step(tmp_path):
    large, _, _ = _documents()
    folder = rescue_folder(tmp_path)
    _leave(folder, 0, {0: 8})
    _leave(folder, 3, {1: 7})
    assert complete_rescue(large, tmp_path) is None
    _leave(folder, 2, {1: 8})
    assert complete_rescue(large, tmp_path) == rescued_step(folder) == 8
    assert owners(folder, 8) == {"weight-0": folder / "rank-0.pt", "weight-1": folder / "rank-2.pt"}
    _leave(folder, 1, {0: 7})
    assert complete_rescue(large, tmp_path) == 8, "the later one of two"


def test_only_plans_whose_ranks_hold_whole_tensors_more_than_once_can_be_rescued():
    large, small, _ = _documents()
    assert is_rescuable(large) and not is_rescuable(small)
    chain = split(build_wide())
    sharded = plan_of(chain, profile_of(chain), "1f1b", 2, 4, degrees=Degrees(dp=2, zero=1))
    assert not is_rescuable(sharded)


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
