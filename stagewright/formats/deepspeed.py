"""A plan as a DeepSpeed configuration: batch, ZeRO stage, precision, tensor and sequence degrees, activation checkpoints.

The pipeline itself is built in the user's program (`PipelineModule`), so its cut stands in a second file of arguments for it.
DeepSpeed runs 1F1B with one chunk a rank, and ZeRO 2 and 3 only without a pipeline.
"""

from __future__ import annotations

import json

from stagewright.formats.exported import Exported, Loss
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile, Recompute
from stagewright.planner.errors import NotExpressible

CONFIG_NAME = "ds_config.json"
PIPELINE_NAME = "pipeline.json"

_OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "sgd-momentum": "SGD"}


def deepspeed(plan: Plan, profile: ModelProfile) -> Exported:
    """Return the configuration, and for a pipeline the bounds of its stages.

    Raises
    ------
    NotExpressible : for ZeRO 2 or 3 in a pipeline, several chunks or replicas, or stages that differ in degrees.
    """
    degrees, schedule = plan.stages[0].degrees, plan.schedule
    _require(plan)
    config: dict[str, object] = {
        "train_batch_size": plan.job.global_batch,
        "train_micro_batch_size_per_gpu": schedule.microbatch,
        "gradient_accumulation_steps": schedule.num_microbatches,
        "zero_optimization": {"stage": degrees.zero, "overlap_comm": degrees.zero > 0},
    }
    if plan.job.precision in ("bf16", "fp16"):
        config[plan.job.precision] = {"enabled": True}
    losses = [Loss(name, "exact") for name in ("job.global_batch", "schedule.microbatch", "degrees.dp", "degrees.zero")]
    losses.append(_optimizer(plan, config))
    if degrees.tp > 1:
        config["tensor_parallel"] = {"autotp_size": degrees.tp}
        note = "AutoTP has no sequence parallel regions" if degrees.sp else ""
        losses.append(Loss("degrees.tp", "approximated" if degrees.sp else "exact", note))
    if degrees.cp > 1:
        config["sequence_parallel_size"] = degrees.cp
        exact = degrees.ulysses == degrees.cp
        note = "" if exact else f"all of cp {degrees.cp} is Ulysses, of the plan {degrees.ulysses}"
        losses.append(Loss("degrees.cp", "exact" if exact else "approximated", note))
    if degrees.ep > 1:
        config["moe"] = {"ep_size": degrees.ep}
        losses.append(Loss("degrees.ep", "exact"))
    losses.append(_recomputation(plan, config))
    files = {CONFIG_NAME: json.dumps(config, indent=2) + "\n"}
    if schedule.num_ranks > 1:
        files[PIPELINE_NAME] = _pipeline(plan, profile)
        losses.append(Loss("stages.layers", "exact"))
        exact = schedule.name in ("1f1b", "dapple")
        note = "" if exact else f"DeepSpeed runs 1f1b instead of {schedule.name}"
        losses.append(Loss("schedule.name", "exact" if exact else "approximated", note))
    return Exported(files, tuple(losses))


def _require(plan: Plan) -> None:
    degrees, schedule = plan.stages[0].degrees, plan.schedule
    wrong = ""
    if schedule.num_ranks > 1 and degrees.zero > 1:
        wrong = f"ZeRO {degrees.zero} with {schedule.num_ranks} pipeline ranks"
    elif len(plan.stages) != schedule.num_ranks or schedule.num_replicas > 1:
        wrong = f"{len(plan.stages)} stages on {schedule.num_ranks} pipeline ranks"
    elif any(stage.degrees != degrees or stage.layers is None for stage in plan.stages):
        wrong = "stages of different degrees, or a graph of them"
    if wrong:
        raise NotExpressible(
            f"DeepSpeed does not run {wrong}", field="stages", hint="plan again with --pin chunks=1 and --pin zero=1"
        )


def _optimizer(plan: Plan, config: dict[str, object]) -> Loss:
    name = plan.job.optimizer.name
    if name not in _OPTIMIZERS:
        return Loss("job.optimizer", "dropped", f"none is named for {name}: the program makes the optimizer")
    momentum = {"momentum": 0.9} if name == "sgd-momentum" else {}
    config["optimizer"] = {"type": _OPTIMIZERS[name], "params": {"lr": "auto", **momentum}}
    return Loss("job.optimizer", "exact")


def _recomputation(plan: Plan, config: dict[str, object]) -> Loss:
    levels = {level for stage in plan.stages for level in stage.recompute_levels()}
    if levels == {Recompute.NONE}:
        return Loss("stages.recompute", "exact")
    config["activation_checkpointing"] = {"partition_activations": False, "contiguous_memory_optimization": False}
    if levels == {Recompute.FULL}:
        return Loss("stages.recompute", "exact", "the program wraps every layer")
    return Loss(
        "stages.recompute", "approximated", "the program chooses which layers it wraps; DeepSpeed knows full only"
    )


def _pipeline(plan: Plan, profile: ModelProfile) -> str:
    """Return what `PipelineModule` takes: the number of stages, and the names of each stage's layers."""
    names = profile.layer_names
    stages = [[names[index] for index in stage.layer_indices] for stage in plan.stages]
    return json.dumps({"num_stages": len(stages), "stages": stages}, indent=2) + "\n"
