"""Running a plan: the one way in, for the command line and for scripts. Imports no torch; the ranks do."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.expectation import peaks_by_device, with_expectation
from stagewright.planner.layerwise import is_layerwise
from stagewright.runtime.failure import LOST
from stagewright.runtime.job import RunJob
from stagewright.runtime.launch import Progress, launch
from stagewright.runtime.measurement import Measurement
from stagewright.runtime.program import describe_action, program_of
from stagewright.runtime.replay import compose, replayed_ranks
from stagewright.runtime.replay import replay as run_replays
from stagewright.runtime.report import RunReport, make_replay_report, make_report
from stagewright.runtime.rescue import is_rescuable, rescue_folder
from stagewright.runtime.support import (
    check_devices,
    check_layerwise_model,
    check_memory,
    check_shared_weights,
    check_split_logits,
    check_supported,
    check_world,
)
from stagewright.runtime.topology import has_unequal_replicas, has_unequal_tensors
from stagewright.runtime.training import TrainingSettings

CHECKS = ("gradients", "memory", "traffic", "time")


class RunOptions(TypedDict):
    """What `run_plan` and `elastic.run_elastic` are told alike."""

    model: str
    data: str | None
    steps: int
    checks: Sequence[str]
    training: TrainingSettings
    torchrun_arguments: Sequence[str]
    progress: Progress | None


def run_plan(
    plan: Plan,
    profile: ModelProfile,
    *,
    model: str,
    data: str | None = None,
    steps: int = 20,
    checks: Sequence[str] = CHECKS,
    emulate: bool = False,
    replay: str | None = None,
    torchrun_arguments: Sequence[str] = (),
    progress: Progress | None = None,
    directory: Path | None = None,
    seed: int = 0,
    training: TrainingSettings | None = None,
    rescue: bool = False,
) -> RunReport:
    """Execute a plan on this machine and compare it with its prediction.

    Parameters
    ----------
    model, data : factories, `module:factory` or `path.py:factory`; without data the model's file is asked for `data`.
    steps : timed training steps, after the checks and a warm-up.
    checks : any of CHECKS; gradients are not compared under asynchronous schedules, whose weights are delayed.
    emulate : actions wait their planned time instead of computing; communication is real.
    replay : a global rank, or `all`: replay one rank at a time on one device, without its peers, and compose the step.
    progress : told (phase, done, total).
    training : optimizer's numbers, clipping, learning-rate schedule, checkpoints; a run that loads one warms up no more.
    rescue : when a rank is lost, the others leave what they hold in `directory`, where the plan has replicas.
    directory : where the ranks' logs and raw results stay; a temporary one, removed on success, unless given.

    Raises
    ------
    InvalidDocument, InvalidArgument : before any rank starts, when plan, profile, model or checks do not fit.
    RunFailed : when a rank raised, died or fell silent; no process is left behind.
    """
    unknown = sorted(set(checks) - set(CHECKS))
    if unknown:
        raise InvalidArgument(f"there is no check {unknown[0]!r}", field="check", hint=f"one of {', '.join(CHECKS)}")
    if replay is not None and emulate:
        raise InvalidArgument("a run is replayed or emulated, not both", field="replay")
    if emulate:
        checks = tuple(check for check in checks if check in ("traffic", "time"))
    if steps < 1:
        raise InvalidArgument(f"steps is {steps}, it must be at least 1", field="steps")
    _refuse_frozen_by_hand(profile)
    check_supported(plan)
    check_shared_weights(plan, profile)
    check_layerwise_model(plan, profile)
    check_split_logits(plan, profile)
    if is_layerwise(plan) and (emulate or replay is not None):
        raise InvalidArgument(
            "layers with degrees of their own are neither emulated nor replayed",
            field="emulate" if emulate else "replay",
            hint="run the plan with its model",
        )
    if (emulate or replay is not None) and has_unequal_tensors(plan):
        raise InvalidArgument(
            f"stages have tp {[stage.degrees.tp for stage in plan.stages]} and cp {[stage.degrees.cp for stage in plan.stages]}, an "
            "emulated or replayed run takes equal ones",
            field="emulate" if emulate else "replay",
            hint="run the plan with its model",
        )
    if emulate and has_unequal_replicas(plan):
        raise InvalidArgument(
            f"stages have {[stage.degrees.dp for stage in plan.stages]} replicas, an emulated run takes equal numbers",
            field="emulate",
            hint="run the plan with its model",
        )
    check_world(plan, torchrun_arguments)
    if not emulate and replay is None:
        check_devices(plan)
    replayed = None if replay is None else replayed_ranks(plan, replay)
    schedule, evaluation = program_of(plan, profile)
    if not emulate:  # emulated actions take just their medians
        evaluation = with_expectation(evaluation, plan, profile)
        check_memory(plan, evaluation.prediction.peak_memory_bytes)
        from stagewright.runtime.building import refuse_other_layers  # with torch: behind all that is told without it

        refuse_other_layers(_absolute(model), profile, plan)
    if (
        "local_steps" in plan.schedule.parameters
    ):  # replicas do not equal one process, nor does one step send what all do
        checks = tuple(check for check in checks if check not in ("gradients", "traffic"))
    if not evaluation.schedule.is_synchronous:
        checks = tuple(check for check in checks if check != "gradients")  # one process has no delayed weights
    with _run_directory(directory) as path:
        plan.save(path / "plan.json")
        profile.save(path / "profile.json")
        job = RunJob(
            directory=str(path),
            model=_absolute(model),
            data=None if data is None else _absolute(data),
            steps=steps,
            checks=tuple(checks),
            num_threads=profile.pedigree.threads_per_rank,
            working_directory=str(Path.cwd()),
            launcher=os.getpid(),
            seed=seed,
            training=_located(training or TrainingSettings()),
            emulate=emulate,
            rescue=rescue and evaluation.schedule.is_synchronous and is_rescuable(plan),
        )
        job.save()
        if replayed is not None:
            composed = compose(plan, profile, evaluation, run_replays(job, replayed, progress=progress))
            return make_replay_report(plan, evaluation, composed)
        launch(
            job,
            plan.num_devices,
            torchrun_arguments=torchrun_arguments,
            describe=lambda rank, step, position: describe_action(plan, schedule, rank, step, position),
            progress=progress,
        )
        measurement = Measurement.load(path / "measurement.json")
    peaks = None if emulate else peaks_by_device(plan, profile)
    return make_report(plan, evaluation, measurement, checks, probe_s=profile.pedigree.probe_s, peak_bytes=peaks)


def _refuse_frozen_by_hand(profile: ModelProfile) -> None:
    """Raise InvalidArgument for a profile whose layers were frozen in the document and not in the model."""
    frozen = sorted(layer.frozen_from for layer in profile.classes.values() if layer.frozen_from is not None)
    if frozen:
        raise InvalidArgument(
            f"layers of {', '.join(frozen)} are frozen in profile {profile.name} alone, and a model says itself what it trains",
            field="profile",
            hint="freeze the model's parameters, measure it with `stagewright profile`, and plan with that profile",
        )


def _located(training: TrainingSettings) -> TrainingSettings:
    """Return the settings with whole paths, as the ranks read them."""
    paths = {name: getattr(training, name) for name in ("save", "load")}
    schedule = training.learning_rate_schedule
    return replace(
        training,
        learning_rate_schedule=None if schedule is None else _absolute(schedule),
        **{name: None if path is None else str(Path(path).resolve()) for name, path in paths.items()},
    )


def _absolute(reference: str) -> str:
    place, separator, name = reference.rpartition(":")
    return f"{Path(place).resolve()}{separator}{name}" if place.endswith(".py") else reference


@contextlib.contextmanager
def _run_directory(directory: Path | None) -> Iterator[Path]:
    """Yield the run's directory; a temporary one is removed when all went well, and kept for a look when not."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in [*directory.glob("failure.*.json"), directory / "events.jsonl", directory / LOST]:
            leftover.unlink(missing_ok=True)
        shutil.rmtree(rescue_folder(directory), ignore_errors=True)
        yield directory.resolve()
        return
    path = Path(tempfile.mkdtemp(prefix="stagewright-run-"))
    yield path
    shutil.rmtree(path)
