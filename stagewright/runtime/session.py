"""What one rank does in a run, in order: reference, checks, memory, timed steps, results.

Every rank runs the same phases; what is compared or gathered is so by collectives that all of them enter.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, repeat
from math import gcd

import torch
import torch.distributed as dist
from torch import nn

from stagewright.modeling.batch import Batch
from stagewright.modeling.chain import LayerChain
from stagewright.modeling.factory import load_function
from stagewright.modeling.kept_memory import allocator_name
from stagewright.modeling.speed_probe import SpeedProbe, stolen_seconds
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.prediction import Evaluation
from stagewright.planner.schedules.schedule import Schedule
from stagewright.runtime.building import build_model, split_as_profiled
from stagewright.runtime.checkpoint import load_checkpoint, save_checkpoint
from stagewright.runtime.data import open_data
from stagewright.runtime.emulation import EmulatedWorker
from stagewright.runtime.gradient_check import Comparison, compare, reference_shapes
from stagewright.runtime.job import RunJob
from stagewright.runtime.measurement import Measurement, probes_around
from stagewright.runtime.memory import RankMemory, measure_memory
from stagewright.runtime.microbatches import samples_of
from stagewright.runtime.optimizers import check_choice, training_choice
from stagewright.runtime.recorder import now_s
from stagewright.runtime.reference import ReferenceRun, run_reference
from stagewright.runtime.rescue import Rescue
from stagewright.runtime.status import StatusFile
from stagewright.runtime.stillness import comparable
from stagewright.runtime.torch_adapter import default_store
from stagewright.runtime.training import WARM_UP_STEPS, checkpoint_folder, find_checkpoint, mark_latest
from stagewright.runtime.worker import Worker, WorkerSettings


class Session:
    """One rank's run of a job."""

    def __init__(
        self,
        job: RunJob,
        plan: Plan,
        profile: ModelProfile,
        schedule: Schedule,
        evaluation: Evaluation,
        device: torch.device,
        status: StatusFile,
        rescue: Rescue | None = None,
    ) -> None:
        self._job = job
        self._plan = plan
        self._profile = profile
        self._schedule = schedule
        self._evaluation = evaluation
        self._device = device
        self._status = status
        self._rank = dist.get_rank()
        self._rescue = rescue
        self._step = 0
        self._trained = 0

    def run(self) -> None:
        """Run all phases; rank 0 writes the measurement."""
        if self._job.emulate:
            self._emulate()
            return
        model = self._build()
        chain = split_as_profiled(model, self._job.model, self._profile, self._plan, self._device)
        self._samples = samples_of(self._plan, self._schedule)
        batches = self._batches(model)
        checked: list[Batch] = []
        if "gradients" in self._job.checks:
            checked = list(islice(batches, self._job.check_steps))
            batches = self._batches(model)  # training begins with the first one again
        reference = self._reference(chain, checked)
        shapes = reference_shapes(chain)
        self._enter("building")
        worker = self._worker(chain)
        gradients = weights = None
        if checked:
            with comparable(chain.model, self._plan):
                gradients, weights = self._check(worker, checked, reference, shapes)
        del reference
        memory = self._train_setup(worker, batches)
        probe = SpeedProbe() if self._device.type == "cpu" else None
        timed = self._timed(worker, batches, probe)
        self._write(
            replace(
                timed,
                first_step=self._trained - len(timed.losses),
                peak_memory_bytes=[item.peak for item in memory],
                static_memory_bytes=[
                    {
                        "parameters": item.parameters,
                        "gradients": item.gradients,
                        "optimizer": item.optimizer,
                        **({"host": item.host} if item.host else {}),
                    }
                    for item in memory
                ],
                gradients=None if gradients is None else (gradients.max_relative_error, gradients.parameter),
                weights=None if weights is None else (weights.max_relative_error, weights.parameter),
                versions=_versions(),
            )
        )
        worker.close()

    def _worker(self, chain: LayerChain) -> Worker:
        """Return what runs this rank's part of the plan."""
        settings = WorkerSettings(self._device, seed=self._job.seed)

        def at_action(position: int) -> None:
            self._status.at(self._rank, self._step, position)

        store = dist.PrefixStore("worker", default_store())
        return Worker(self._plan, self._schedule, chain, settings, store=store, at_action=at_action)

    def _emulate(self) -> None:
        worker = EmulatedWorker(
            self._plan,
            self._profile,
            self._schedule,
            self._evaluation,
            store=dist.PrefixStore("worker", default_store()),
            at_action=lambda position: self._status.at(self._rank, self._step, position),
        )
        self._enter("warming up")
        self._run(worker, None, 0)
        self._write(replace(self._timed(worker, repeat(None)), versions=_versions()))

    def _build(self) -> nn.Module:
        self._enter("building")
        return build_model(self._job.model, self._plan, seed=self._job.seed)

    def _reference(self, chain: LayerChain, batches: list[Batch]) -> ReferenceRun | None:
        if not batches or self._rank != 0:
            return None
        self._enter("reference")
        with comparable(chain.model, self._plan):
            return run_reference(
                chain,
                batches,
                microbatch=gcd(self._samples, self._plan.schedule.microbatch),
                seed=self._job.seed,
                device=self._device,
                optimizer=check_choice(self._plan),
            )

    def _check(
        self,
        worker: Worker,
        batches: list[Batch],
        reference: ReferenceRun | None,
        shapes: dict[str, tuple[int, ...]],
    ) -> tuple[Comparison, Comparison]:
        """Compare the gradients of the first batch and the weights after a step on each; the weights are put back."""
        self._enter("checking")
        self._run(worker, batches[0], 0)
        gradients = compare(worker, worker.gradients(), None if reference is None else reference.gradients, shapes)
        worker.zero_gradients()
        before = worker.weights()
        worker.use_optimizer(check_choice(self._plan))
        for step, batch in enumerate(batches):
            self._run(worker, batch, step)
        changes = {name: value - before[name] for name, value in worker.weights().items()}
        told = None if reference is None else reference.changes
        weights = compare(worker, changes, told, shapes, around=before)
        worker.load_weights(before)
        worker.use_optimizer(None)
        return gradients, weights

    def _train_setup(self, worker: Worker, batches: Iterator[Batch]) -> list[RankMemory]:
        """Make the job's optimizer, let its states come into being, and measure the memory of one step."""
        training = self._job.training
        worker.use_optimizer(training_choice(self._plan, training))
        worker.settings = replace(
            worker.settings,
            clip_norm=training.clip_norm,
            skip_nonfinite=training.skip_nonfinite,
            learning_rate_factor=load_function(training.learning_rate_schedule),
        )
        if training.load is not None:
            self._enter("loading")
            self._trained = load_checkpoint(worker, find_checkpoint(training.load))
            next(islice(batches, self._trained, self._trained), None)
        if self._rescue is not None:
            self._rescue.worker, self._rescue.first_step = worker, self._trained
        if training.load is None:
            self._enter("warming up")
            for _ in range(WARM_UP_STEPS):
                self._train(worker, next(batches))
        if "memory" not in self._job.checks:
            return []
        self._enter("memory")
        batch = next(batches)
        mine = measure_memory(worker, lambda: self._train(worker, batch), self._device)
        self._save(worker, is_last=False)
        everyone: list[RankMemory] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return everyone

    def _timed(
        self, worker: Worker | EmulatedWorker, batches: Iterator[Batch | None], probe: SpeedProbe | None = None
    ) -> Measurement:
        """Run the timed steps; returns their times and losses, the spans of the median one, bytes sent in one, and probes.

        A probe stands behind each step, outside its time: right behind the model's own work, as where the profile was made,
        since one behind another probe reads an eighth faster.
        """
        self._enter("training")
        times, losses, kept, probes, stolen = [], [], [], [], []
        busy = min(int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())), os.cpu_count() or 1)
        sent: dict[str, float] = {}
        for index in range(self._job.steps):
            batch = next(batches)
            dist.barrier()
            before = worker.traffic()
            stolen_s = stolen_seconds()
            begin = now_s()
            loss = self._train(worker, batch)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            span = (begin, now_s())
            sent = {name: value - before.get(name, 0.0) for name, value in worker.traffic().items()}
            stolen_s = stolen_seconds() - stolen_s
            dist.barrier()
            probed_s = probe.seconds() if probe is not None else 0.0
            mine = (span, loss, probed_s)
            everyone: list[tuple[tuple[float, float], float | None, float]] = [mine] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
            times.append(max(end for (_, end), *_ in everyone) - min(start for (start, _), *_ in everyone))
            losses.append(sum(value for _, value, _ in everyone if value is not None))
            if probe is not None:
                probes.append([seconds for *_, seconds in everyone])
                stolen.append(stolen_s / (busy * times[-1]))
            kept.append([[self._rank, *row] for row in worker.recorder.rows])
            self._event(
                "step", index + 1, self._job.steps, loss=losses[-1], step_time_s=times[-1], step=self._trained - 1
            )
            self._save(worker, is_last=index + 1 == self._job.steps)
        if not times:
            return Measurement([], [])
        median = sorted(range(len(times)), key=times.__getitem__)[len(times) // 2]
        gathered: list[tuple[list[list[float]], dict[str, float]]] = [(kept[median], sent)] * dist.get_world_size()
        dist.all_gather_object(gathered, (kept[median], sent))
        names = sorted({name for _, each in gathered for name in each})
        total = {name: sum(each.get(name, 0.0) for _, each in gathered) for name in names}
        return Measurement(
            times,
            losses,
            sent_bytes=total,
            rows=[row for rows, _ in gathered for row in rows],
            probe_s=probes_around(probes),
            stolen_share=stolen,
        )

    def _run(self, worker: Worker | EmulatedWorker, batch: Batch | None, step: int) -> float | None:
        loss = worker.run(batch, step)
        self._step += 1
        return loss

    def _train(self, worker: Worker | EmulatedWorker, batch: Batch | None) -> float | None:
        """Run the next training step; its number decides random numbers and learning rate, whatever ran before it."""
        loss = self._run(worker, batch, self._trained)
        self._trained += 1
        return loss

    def _save(self, worker: Worker | EmulatedWorker, *, is_last: bool) -> None:
        """Write a checkpoint where one is due; every rank calls this."""
        training = self._job.training
        if training.save is None or isinstance(worker, EmulatedWorker):
            return
        if training.is_saved(self._trained, is_last=is_last):
            save_checkpoint(worker, checkpoint_folder(training.save, self._trained), step=self._trained)
            dist.barrier()
            if self._rank == 0:
                mark_latest(training.save, self._trained)

    def _batches(self, model: nn.Module) -> Iterator[Batch]:
        return open_data(
            self._job.data,
            self._job.model,
            model,
            samples=self._samples,
            sequence_length=self._plan.job.sequence_length,
        )

    def _enter(self, phase: str) -> None:
        self._status.enter(self._rank, phase)
        self._event("phase", 0, 0, phase=phase)

    def _event(self, kind: str, done: int, total: int, **values: float | str) -> None:
        """Append one line to the run's log; rank 0 speaks for all."""
        if self._rank == 0:
            line = json.dumps({"event": kind, "done": done, "total": total, "time_s": now_s(), **values})
            with (self._job.path / "events.jsonl").open("a") as stream:
                stream.write(line + "\n")

    def _write(self, measurement: Measurement) -> None:
        if self._rank == 0:
            measurement.save(self._job.path / "measurement.json")


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version(), "allocator": allocator_name()}
