"""The process that replays one rank alone: `python -m stagewright.runtime.replay_rank JOB RANK`.

The rank's worker is the one of a real run, in a group in which it plays all peers (`lone_group`): the same modules,
shards, buffers and actions, with random values where others would have sent theirs. On CUDA the device is waited for
around each action, so that a span is the action's own time.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from stagewright.modeling.batch import Batch, shape_key
from stagewright.modeling.kept_memory import keep_freed_memory
from stagewright.modeling.unfilled import without_values
from stagewright.planner.documents.document import write_text
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import StagewrightError
from stagewright.planner.schedules.action import COMPUTE_KINDS, Kind
from stagewright.runtime.boundary_shapes import BoundaryShapes
from stagewright.runtime.building import build_model, split_as_profiled
from stagewright.runtime.communication import ShapeBook
from stagewright.runtime.data import open_data
from stagewright.runtime.failure import OWN, RankFailure, now
from stagewright.runtime.job import RunJob
from stagewright.runtime.lone_group import init_lone_group
from stagewright.runtime.memory import measure_memory
from stagewright.runtime.microbatches import samples_of
from stagewright.runtime.optimizers import training_choice
from stagewright.runtime.program import program_of
from stagewright.runtime.recorder import now_s
from stagewright.runtime.replay import RankReplay
from stagewright.runtime.torch_adapter import default_store
from stagewright.runtime.worker import Worker, WorkerSettings

WARM_UP_STEPS = 1


def main(path: str, rank: int) -> int:
    """Replay one rank of the job in a file and write what it took; returns the exit code."""
    job = RunJob.load(path)
    try:
        replay = replay_rank(job, rank)
    except BaseException as error:
        _report(job, rank, error)
        traceback.print_exc()
        return 1
    write_text(job.path / f"replay.{rank}.json", json.dumps(replay.to_json()))
    return 0


def replay_rank(job: RunJob, rank: int) -> RankReplay:
    """Return seconds by action and peak memory of one rank."""
    torch.set_num_threads(job.num_threads)
    keep_freed_memory()
    plan, profile = Plan.load(job.path / "plan.json"), ModelProfile.load(job.path / "profile.json")
    schedule, _ = program_of(plan, profile)
    device = _device(plan)
    init_lone_group(rank, plan.num_devices)
    os.chdir(job.working_directory)
    model = _build(job, plan)
    chain = split_as_profiled(model, job.model, profile, plan, device)
    shapes = BoundaryShapes(model, plan, device)
    batches = open_data(
        job.data, job.model, model, samples=samples_of(plan, schedule), sequence_length=plan.job.sequence_length
    )
    store = dist.PrefixStore("worker", default_store())
    worker = Worker(plan, schedule, chain, WorkerSettings(device, seed=job.seed, clock=_clock(device)), store=store)
    (first,) = islice(batches, 1)
    _publish(ShapeBook(store), shapes, worker, first)
    del shapes
    worker.use_optimizer(training_choice(plan, job.training))
    for step in range(WARM_UP_STEPS):
        worker.run(first, step)
    memory = measure_memory(worker, lambda: worker.run(first, WARM_UP_STEPS), device)
    actions = _timed(worker, batches, job.steps)
    return RankReplay(
        rank=rank,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        action_s=actions,
        peak_memory_bytes=memory.peak,
        static_memory_bytes={
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            **({"host": memory.host} if memory.host else {}),
        },
    )


def _build(job: RunJob, plan: Plan) -> nn.Module:
    """Return the model, without values where it can be built so."""
    try:
        with without_values():
            return build_model(job.model, plan, seed=job.seed)
    except (RuntimeError, NotImplementedError):
        return build_model(job.model, plan, seed=job.seed)


def _publish(book: ShapeBook, shapes: BoundaryShapes, worker: Worker, batch: Batch) -> None:
    """Make known the shapes of everything that the rank will receive."""
    pieces = {shape_key(given.batch): given.batch for given in worker.iteration(batch, 0).values()}
    for piece in pieces.values():
        for key, specs in shapes.messages(piece).items():
            book.publish_specs(key, specs)


def _timed(worker: Worker, batches: Iterator[Batch], steps: int) -> dict[str, float]:
    """Return the median seconds, over steps and microbatches, of each kind of action of each stage."""
    found: dict[tuple[int, int], list[float]] = {}
    for step, batch in enumerate(islice(batches, steps)):
        worker.run(batch, step)
        for _, kind, _, stage, _, _, _, start_s, end_s in worker.recorder.rows:
            if Kind(kind) in COMPUTE_KINDS or Kind(kind) is Kind.OPT:
                found.setdefault((stage, kind), []).append(end_s - start_s)
    return {f"{stage}{Kind(kind).name}": float(np.median(values)) for (stage, kind), values in sorted(found.items())}


def _device(plan: Plan) -> torch.device:
    if plan.cluster.groups[0].device.kind == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)
    return torch.device("cpu")


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return now_s

    def clock() -> float:
        torch.cuda.synchronize(device)
        return now_s()

    return clock


def _report(job: RunJob, rank: int, error: BaseException) -> None:
    place = "while replaying"
    if isinstance(error, StagewrightError):
        failure = RankFailure(
            rank, OWN, place, error.message, error.kind, error.field, error.hint, error.exit_code, now()
        )
    else:
        failure = RankFailure(rank, OWN, place, f"{type(error).__name__}: {error}", time_s=now())
    failure.save(Path(job.directory), rank)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
