"""Replaying a plan's ranks one at a time on one device, so that one GPU checks the plan of a thousand.

Each replayed rank runs alone, in a process of its own (`replay_rank`): its stages, shards and actions are those of the
plan, the messages and collectives of its peers are stood in for. That measures the seconds of each action without
communication, and the rank's peak memory. The devices of one pipeline rank do the same work, so one of them speaks for
all; with context parallelism, the one with the last part of the sequence, which a causal mask gives most work.

The simulator composes the step: each stage's measured seconds, plus what the plan predicts for the collectives inside
its actions, on the plan's links and under its schedule. Compute of an action is the prediction on links that cost
nothing; its communication is the difference.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.cluster import Cluster, LinkLevel
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.prediction import Evaluation, evaluate
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.timeline import Timeline
from stagewright.runtime.failure import load_failures
from stagewright.runtime.job import RunJob
from stagewright.runtime.launch import Progress, error_of, rank_environment

Floats = npt.NDArray[np.float64]

FASTEST_BYTES_PER_S = 1e30


@dataclass(frozen=True)
class RankReplay:
    """What one rank took alone.

    Parameters
    ----------
    rank : global rank.
    device : what it ran on.
    action_s : median seconds of each kind of action of each stage, without communication, by text: `2F`, `2B`, `2OPT`.
    peak_memory_bytes : highest, without what the framework holds; static_memory_bytes : states by item.
    """

    rank: int
    device: str
    action_s: Mapping[str, float]
    peak_memory_bytes: float
    static_memory_bytes: Mapping[str, float]

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class ComposedStep:
    """The whole step from replayed ranks.

    Parameters
    ----------
    timeline : the schedule with the measured seconds; step_time_s : its length and the step's overhead.
    rows : for each replayed rank, its actions and peak memory, predicted against measured.
    peak_memory_bytes : measured, of each global rank that a replayed one speaks for, None for the others.
    """

    timeline: Timeline
    step_time_s: float
    rows: list[dict[str, object]]
    peak_memory_bytes: list[float | None]


def replayed_ranks(plan: Plan, choice: str) -> tuple[int, ...]:
    """Return the ranks to replay: one, or with `all` one device of each pipeline rank.

    Raises InvalidArgument for what is neither `all` nor a rank of the plan.
    """
    if choice == "all":
        found = []
        for pipeline_rank, ranks in enumerate(plan.mapping.pipeline_ranks):
            stage = next(
                s for row in plan.schedule.placement for s, holder in enumerate(row) if holder == pipeline_rank
            )
            degrees = plan.stages[stage].degrees
            found.append(ranks[(degrees.cp - 1) * degrees.tp])
        return tuple(found)
    if not choice.isdecimal() or int(choice) >= plan.num_devices:
        raise InvalidArgument(
            f"replay is {choice!r}, the plan has ranks 0 to {plan.num_devices - 1}",
            field="replay",
            hint="give a rank, or all",
        )
    return (int(choice),)


def replay(job: RunJob, ranks: Sequence[int], *, progress: Progress | None = None) -> list[RankReplay]:
    """Return what each rank took, replayed one after another; raises what a rank raised."""
    found = []
    for index, rank in enumerate(ranks):
        if progress is not None:
            progress(f"replaying rank {rank}", index, len(ranks))
        with (job.path / f"replay.{rank}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "stagewright.runtime.replay_rank", str(job.path / "job.json"), str(rank)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=rank_environment(job),
                cwd=job.working_directory,
            )
            try:
                code = process.wait()
            finally:
                process.kill()
                process.wait()
        if code:
            raise error_of(load_failures(job.path).get(rank), rank, code, job.path / f"replay.{rank}.log")
        found.append(RankReplay(**json.loads((job.path / f"replay.{rank}.json").read_text())))
    return found


def compose(plan: Plan, profile: ModelProfile, evaluation: Evaluation, replays: Sequence[RankReplay]) -> ComposedStep:
    """Return the step that the replayed ranks make; stages of other ranks take their predicted seconds."""
    free = evaluate(plan.model_copy(update={"cluster": without_link_costs(plan.cluster)}), profile)
    compute = free.pipeline.costs
    measured = compute.copy()
    optimizer = evaluation.pipeline.optimizer_s.copy()
    for each in replays:
        for stage in sorted({_stage(name) for name in each.action_s}):
            measured[:, stage] = _stage_seconds(each.action_s, stage, plan.schedule.num_slices, compute[:, stage])
            optimizer[stage] = each.action_s.get(f"{stage}{Kind.OPT.name}", optimizer[stage])
    communication = evaluation.pipeline.costs - compute
    forward, input_grad, weight_grad = measured + communication
    recompute = evaluation.costs.recompute_s
    costs: StageCosts = replace(
        evaluation.costs,
        forward_s=forward,
        input_grad_s=np.maximum(input_grad - recompute, 0.0),
        weight_grad_s=weight_grad,
        recompute_s=np.minimum(recompute, input_grad),
    )
    tail = evaluation.pipeline.tail_s.copy()
    for rank in range(plan.schedule.num_ranks):
        held = sorted(s for row in plan.schedule.placement for s, holder in enumerate(row) if holder == rank)
        tail[rank] += (optimizer[held] - evaluation.pipeline.optimizer_s[held]).sum()
    timeline = simulate(evaluation.schedule, costs, links=evaluation.links, tail_s=tail)
    peaks: list[float | None] = [None] * plan.num_devices
    rows = []
    for each in replays:
        pipeline_rank = next(i for i, ranks in enumerate(plan.mapping.pipeline_ranks) if each.rank in ranks)
        peak = each.peak_memory_bytes + evaluation.prediction.memory[pipeline_rank].framework
        for rank in plan.mapping.pipeline_ranks[pipeline_rank]:
            peaks[rank] = peak
        predicted_peak = evaluation.prediction.peak_memory_bytes[pipeline_rank]
        rows.append(
            {
                "rank": each.rank,
                "pipeline_rank": pipeline_rank,
                "device": each.device,
                "actions": {
                    name: _compared(_predicted(name, compute, evaluation, plan.schedule.num_slices), seconds)
                    for name, seconds in each.action_s.items()
                },
                "peak_memory_bytes": _compared(predicted_peak, peak),
                "static_memory_bytes": dict(each.static_memory_bytes),
            }
        )
    return ComposedStep(timeline, timeline.makespan_s + profile.step_overhead_s, rows, peaks)


def without_link_costs(cluster: Cluster) -> Cluster:
    """Return the cluster with links that take no time."""

    def free(level: LinkLevel) -> LinkLevel:
        return level.model_copy(
            update={
                "latency_s": 0.0,
                "bytes_per_s": FASTEST_BYTES_PER_S,
                "segments": (),
                "collectives": {},
                "overlap_slowdown": 1.0,
            }
        )

    groups = tuple(
        group.model_copy(update={"links": tuple(free(level) for level in group.links)}) for group in cluster.groups
    )
    between = None if cluster.between_groups is None else free(cluster.between_groups)
    return cluster.model_copy(update={"groups": groups, "between_groups": between})


def _stage(name: str) -> int:
    return int(name.rstrip("FBIWROPTL"))


def _stage_seconds(action_s: Mapping[str, float], stage: int, num_slices: int, predicted: Floats) -> Floats:
    """Return measured seconds of F, I and W of a whole microbatch; a full backward is divided as predicted."""
    forward = action_s.get(f"{stage}F", float(predicted[0]) / num_slices)
    if f"{stage}I" in action_s:
        input_grad, weight_grad = action_s[f"{stage}I"], action_s.get(f"{stage}W", 0.0)
    else:
        backward = action_s.get(f"{stage}B", float(predicted[1:].sum()) / num_slices)
        share = float(predicted[1]) / max(float(predicted[1:].sum()), 1e-300)
        input_grad, weight_grad = backward * share, backward * (1.0 - share)
    return np.array([forward, input_grad, weight_grad]) * num_slices


def _predicted(name: str, compute: Floats, evaluation: Evaluation, num_slices: int) -> float | None:
    stage = _stage(name)
    kind = name.removeprefix(str(stage))
    by_kind = {
        "F": compute[0, stage] / num_slices,
        "I": compute[1, stage] / num_slices,
        "W": compute[2, stage] / num_slices,
        "B": compute[1:, stage].sum() / num_slices,
        "OPT": evaluation.pipeline.optimizer_s[stage],
    }
    return float(by_kind[kind]) if kind in by_kind else None


def _compared(predicted: float | None, measured: float) -> dict[str, float | None]:
    error = predicted / measured - 1.0 if predicted is not None and measured > 0 else None
    return {"predicted": predicted, "measured": measured, "error": error}
