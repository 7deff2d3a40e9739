"""Training that outlives lost ranks: on a loss the largest plan that fits what is left goes on from what survivors hold.

Every attempt is a run of its own under torchrun, with its own ranks. When a rank dies, falls silent or is cut off, what is
left of the cluster is all devices but those of its node (of a plan on one node: all but its own). Where replicas hold every
stage, the survivors leave their states (`rescue`) and the run goes on from there, else from the last checkpoint. Of the fallback plans,
the pipeline templates of the cluster, the largest that needs no more continues: whole tensors by name let any plan load
what another one saved. Steps since the last checkpoint are trained again on the same batches, so the loss curve is that of
a run without a loss. A rank that raises of its own ends the run: what is wrong would be wrong again.

Papers: Athlur et al., Varuna, EuroSys 2022 (checkpoints by layer, another depth after a preemption); Jang et al., Oobleck,
SOSP 2023 (templates for every number of nodes, and layers from surviving replicas; here all ranks restart and read them).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidArgument, RankLost
from stagewright.runtime.launch import Progress
from stagewright.runtime.report import RunReport
from stagewright.runtime.rescue import complete_rescue, rescue_folder
from stagewright.runtime.run import run_plan
from stagewright.runtime.training import WARM_UP_STEPS, TrainingSettings, latest_step

_FOR_MEMORY = 1  # steps whose memory is measured, after the warm-up


def run_elastic(
    plan: Plan,
    fallbacks: Sequence[Plan],
    profile: ModelProfile,
    *,
    model: str,
    data: str | None = None,
    steps: int,
    checks: Sequence[str],
    training: TrainingSettings,
    torchrun_arguments: Sequence[str] = (),
    progress: Progress | None = None,
    directory: Path | None = None,
    seed: int = 0,
) -> RunReport:
    """Return the report of the last attempt, with the losses of all steps and what was lost before; see `run_plan`.

    Raises
    ------
    InvalidArgument : when nothing would be saved, or a fallback trains on another batch.
    RankLost : when no fallback fits what is left.
    """
    _check(plan, fallbacks, training)
    assert training.save is not None
    last = WARM_UP_STEPS + _FOR_MEMORY * ("memory" in checks) + steps
    if training.load is not None:
        last = steps + (latest_step(training.load) or 0)
    restarts: list[dict[str, object]] = []
    losses: dict[int, float] = {}
    folder = Path(tempfile.mkdtemp(prefix="stagewright-run-")) if directory is None else directory
    settings, current = training, plan
    while True:
        attempt = folder / f"attempt-{len(restarts)}"
        try:
            report = run_plan(
                current, profile, model=model, data=data, steps=steps, checks=checks, progress=progress, seed=seed,
                training=settings, torchrun_arguments=torchrun_arguments, directory=attempt, rescue=True,
            )  # fmt: skip
            break
        except RankLost as loss:
            losses |= _losses(attempt)
            start, source = latest_step(training.save), training.save
            rescued = complete_rescue(current, attempt)
            if rescued is not None and rescued >= (start or 0):
                start, source = rescued, str(rescue_folder(attempt))
            following = next_plan(current, fallbacks, loss.rank)
            if following is None or (start is not None and start >= last):
                raise
            restarts.append(
                {
                    "rank": loss.rank,
                    "message": loss.message,
                    "continued_from_step": start or 0,
                    "continued_from": "nothing" if start is None else "replicas" if start == rescued else "checkpoint",
                    "num_devices": following.num_devices,
                }
            )
            current, torchrun_arguments = following, ()
            if start is not None:
                settings, steps = replace(training, load=source), last - start
                checks = tuple(check for check in checks if check not in ("gradients", "memory"))
    losses |= {report.first_step + index: loss for index, loss in enumerate(report.losses)}
    if directory is None:
        shutil.rmtree(folder)
    first = min(losses)
    return replace(report, losses=tuple(losses[step] for step in sorted(losses)), first_step=first, restarts=restarts)


def next_plan(plan: Plan, fallbacks: Sequence[Plan], lost_rank: int) -> Plan | None:
    """Return the largest fallback that fits on what is left when a rank is lost; the first of equal ones, None for none."""
    left = plan.num_devices - num_lost(plan, lost_rank)
    fitting = [fallback for fallback in fallbacks if fallback.num_devices <= left]
    return max(fitting, key=lambda fallback: fallback.num_devices, default=None)


def num_lost(plan: Plan, rank: int) -> int:
    """Return how many devices of a plan are lost with a rank: those of its node, or its own where there is one node."""
    start = 0
    for group in plan.cluster.groups:
        per_node = group.links[0].num_devices
        if rank < start + group.num_devices:
            first = start + (rank - start) // per_node * per_node
            mates = min(first + per_node, plan.num_devices) - first
            return mates if mates < plan.num_devices else 1
        start += group.num_devices
    return 1


def _check(plan: Plan, fallbacks: Sequence[Plan], training: TrainingSettings) -> None:
    if training.save is None or training.save_every is None:
        raise InvalidArgument(
            "a run that outlives lost ranks has to save",
            field="save",
            hint="say where and how often: --save DIR --save-every STEPS",
        )
    for index, fallback in enumerate(fallbacks):
        if fallback.job.global_batch != plan.job.global_batch:
            raise InvalidArgument(
                f"fallback {index} trains on {fallback.job.global_batch} samples a step, the plan on {plan.job.global_batch}",
                field="fallback",
                hint="plan the smaller cluster for the same --global-batch",
            )


def _losses(directory: Path) -> dict[int, float]:
    """Return the loss of each step that an attempt finished, by its number."""
    path = directory / "events.jsonl"
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    events = [json.loads(line) for line in lines]
    return {int(event["step"]): float(event["loss"]) for event in events if event["event"] == "step"}
