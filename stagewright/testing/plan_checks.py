"""Checks of a plan for a team's own tests: it fits its devices, and it got no worse than a baseline.

A baseline is a small JSON file beside the tests: the predicted step time, the peak memory of each pipeline rank, and the
digest of the plan it was taken from. It is written once, by running pytest with `--stagewright-update-baselines`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import (
    Cluster,
    MemoryItems,
    ModelProfile,
    Pins,
    Plan,
    Prediction,
    SearchSpace,
    TrainingJob,
)
from stagewright.planner.documents.document import read_json, write_text
from stagewright.planner.documents.job import Precision
from stagewright.planner.errors import Infeasible, InvalidDocument, NoIncumbent
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import evaluate

DEFAULT_TOLERANCE = 0.02
DEFAULT_DEADLINE_S = 300.0  # the first plan in a new environment compiles, on a busy machine for a minute


def plan_for(
    model: ModelProfile | str,
    cluster: Cluster | str,
    *,
    global_batch: int,
    sequence_length: int,
    precision: Precision = "bf16",
    memory_headroom: float = 0.0,
    deadline_s: float = DEFAULT_DEADLINE_S,
    schedules: Sequence[str] = (),
    pins: Mapping[str, object] | None = None,
) -> Plan:
    """Return the best plan under the pins (`tp`, `pp`, `dp`, `zero`, `microbatch`, `recompute`, ...).

    Raises
    ------
    Infeasible : when no plan under the pins fits, with the reason and the nearest plan.
    NoIncumbent : when the deadline came first.
    """
    profile = resolve_model(model) if isinstance(model, str) else model
    machines = resolve_cluster(cluster) if isinstance(cluster, str) else cluster
    space = SearchSpace(
        pins=Pins.model_validate(dict(pins or {})), memory_headroom=memory_headroom, schedules=tuple(schedules)
    )
    job = TrainingJob(global_batch=global_batch, sequence_length=sequence_length, precision=precision, space=space)
    outcome = make_plan(profile, machines, job, deadline_s=deadline_s)
    if outcome.plan is None:
        diagnosis = outcome.diagnosis
        if diagnosis is None:
            raise NoIncumbent(
                f"no plan for {profile.name} on {machines.name} was found in {deadline_s:g} s",
                field="deadline_s",
                hint="give deadline_s more seconds",
            )
        raise Infeasible(
            f"no plan for {profile.name} on {machines.name}: {diagnosis.message}",
            field=diagnosis.binding,
            hint="; ".join(item.change for item in diagnosis.relaxations),
        )
    return outcome.plan


def check_plan_fits(
    plan: Plan | Path | str, *, profile: ModelProfile | None = None, memory_bytes: float | None = None
) -> Prediction:
    """Return the plan's prediction when every rank fits.

    Parameters
    ----------
    plan : a plan, or the path of one.
    profile : price the plan anew with this profile; the plan's own prediction counts otherwise.
    memory_bytes : what a device has; the plan's cluster says it unless told.

    Raises
    ------
    AssertionError : naming the fullest rank, what it needs by item, and by how much it misses.
    """
    document = plan if isinstance(plan, Plan) else Plan.load(plan)
    prediction = document.prediction if profile is None else evaluate(document, profile).prediction
    short = []
    for rank, (needed, items) in enumerate(zip(prediction.peak_memory_bytes, prediction.memory, strict=True)):
        available = memory_bytes if memory_bytes is not None else _device_bytes(document, rank)
        if needed > available:
            short.append(
                f"pipeline rank {rank} needs {_gb(needed)}, a device has {_gb(available)}, {_gb(needed - available)} short "
                f"({_largest(items)})"
            )
    if short:
        raise AssertionError(f"the plan for {document.model} does not fit: " + "; ".join(short))
    return prediction


def check_no_regression(
    plan: Plan | Path | str, baseline: Path | str, *, tolerance: float = DEFAULT_TOLERANCE, update: bool = False
) -> None:
    """Compare a plan's predicted step time and peak memory with a baseline file; `update` writes the file instead.

    Raises
    ------
    AssertionError : when one of them is worse by more than `tolerance`, with both numbers.
    InvalidDocument : when the baseline cannot be read.
    """
    document = plan if isinstance(plan, Plan) else Plan.load(plan)
    now = _summary(document)
    if update:
        write_text(baseline, json.dumps({**now, "plan": document.digest}, indent=1) + "\n")
        return
    if not Path(baseline).is_file():
        raise InvalidDocument(
            f"{baseline}: there is no baseline yet",
            field="baseline",
            hint="write it once with pytest --stagewright-update-baselines, and commit it",
        )
    before = read_json(baseline)
    worse = []
    for name, value in now.items():
        reference = before.get(name) if isinstance(before, dict) else None
        if not isinstance(reference, (int, float)) or reference <= 0:
            raise InvalidDocument(f"{baseline}: {name} is missing or no positive number", field=name)
        if value > reference * (1.0 + tolerance):
            worse.append(f"{name} {value:.6g}, was {reference:.6g} ({value / reference - 1.0:+.1%})")
    if worse:
        raise AssertionError(
            f"the plan for {document.model} is worse than {Path(baseline).name} by more than {tolerance:.1%}: "
            + "; ".join(worse)
        )


def _summary(plan: Plan) -> dict[str, float]:
    return {
        "step_time_s": plan.prediction.step_time_s,
        "peak_memory_bytes": max(plan.prediction.peak_memory_bytes),
    }


def _device_bytes(plan: Plan, pipeline_rank: int) -> float:
    first = plan.mapping.pipeline_ranks[pipeline_rank][0]
    return plan.cluster.group_of(first).device.memory_bytes


def _largest(items: MemoryItems) -> str:
    values = sorted(items.model_dump().items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} {_gb(value)}" for name, value in values[:3] if value > 0)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
