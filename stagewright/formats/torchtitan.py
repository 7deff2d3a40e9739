"""A plan as a torchtitan recipe: a Python file that sets a trainer configuration, and the pipeline's schedule as CSV.

`recipe.py` defines `apply(config)`, which takes the `Trainer.Config` of any of torchtitan's model registries and returns it
with parallelism, batch and activation checkpointing as planned. The order of the pipeline's actions is `schedule.csv`, which
torchtitan hands to torch's schedule runtime; stages are lists of module names.

torchtitan's ranks go pp, dp_replicate, dp_shard, cp, tp from the outermost axis inwards and must multiply to the world; an
expert group takes ranks of dp_shard, cp and tp together. Weights are replicated (ZeRO 0) or sharded by FSDP2, whose
`reshard_after_forward` set to never is ZeRO-2 and set to always is ZeRO-3; ZeRO-1 has no equal.
"""

from __future__ import annotations

from stagewright.formats.exported import Exported, Loss
from stagewright.formats.torch_csv import torch_csv
from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.documents.profile import ModelProfile, Recompute
from stagewright.planner.errors import NotExpressible
from stagewright.planner.planned_schedule import schedule_of

RECIPE, SCHEDULE = "recipe.py", "schedule.csv"
_AXES = ("tp", "cp", "dp", "pp")
_MODULES = {"embedding": "tok_embeddings", "norm": "norm", "head": "output"}


def torchtitan(plan: Plan, profile: ModelProfile) -> Exported:
    """Return the recipe and, for a pipeline, the schedule.

    Raises
    ------
    NotExpressible : for stages that differ in degrees, a graph of stages, replicated stages, tensor-parallel experts, or a
        model that is no decoder.
    """
    _require(plan, profile)
    degrees, spec = plan.stages[0].degrees, plan.schedule
    settings = {"training": _training(plan), "parallelism": _parallelism(plan, profile)}
    mode, recompute = _checkpointing(plan, profile)
    settings["activation_checkpoint"] = {"mode": mode}
    files = {RECIPE: _recipe(plan, settings)}
    if spec.num_ranks > 1:
        files[SCHEDULE] = torch_csv(schedule_of(spec))
    losses = [Loss(f"degrees.{name}", "exact") for name in ("dp", "tp", "cp", "ep", "sp")]
    losses += [Loss("stages.layers", "exact"), Loss("schedule.name", "exact"), _states(degrees), recompute]
    losses += _vocabulary(degrees)
    order = tuple(axis for axis in plan.mapping.axis_order if axis not in ("ep", "etp"))
    losses.append(
        Loss("mapping.axis_order", "exact")
        if order == _AXES
        else Loss("mapping.axis_order", "approximated", f"ranks go {', '.join(_AXES)} instead of {', '.join(order)}")
    )
    return Exported(files, tuple(losses))


def shard_degrees(degrees: Degrees) -> tuple[int, int]:
    """Return (dp_replicate, dp_shard): weights of ZeRO 0 are replicated, all others sharded over the replicas."""
    return (degrees.dp, 1) if degrees.zero == 0 and degrees.ep == 1 else (1, degrees.dp)


def _training(plan: Plan) -> dict[str, object]:
    spec = plan.schedule
    samples = spec.microbatch * (spec.num_microbatches if spec.num_ranks > 1 else 1)
    return {
        "local_batch_size": samples,
        "global_batch_size": plan.job.global_batch,
        "seq_len": plan.job.sequence_length,
    }


def _parallelism(plan: Plan, profile: ModelProfile) -> dict[str, object]:
    degrees, spec = plan.stages[0].degrees, plan.schedule
    replicate, shard = shard_degrees(degrees)
    found: dict[str, object] = {
        "data_parallel_replicate_degree": replicate,
        "data_parallel_shard_degree": shard,
        "fsdp_reshard_after_forward": "always" if degrees.zero == 3 else "never",
        "tensor_parallel_degree": degrees.tp,
        "enable_sequence_parallel": degrees.sp,
        "disable_loss_parallel": not degrees.vocab_parallel,
        "context_parallel_degree": degrees.cp,
        "expert_parallel_degree": degrees.ep,
        "pipeline_parallel_degree": spec.num_ranks,
    }
    if spec.num_ranks > 1:
        found |= {
            "pipeline_parallel_schedule": "PipelineScheduleSingle" if spec.num_chunks == 1 else "PipelineScheduleMulti",
            "pipeline_parallel_schedule_csv": SCHEDULE,
            "pipeline_parallel_microbatch_size": spec.microbatch,
            "module_fqns_per_model_part": module_names(plan, profile),
        }
    return found


def module_names(plan: Plan, profile: ModelProfile) -> list[list[str]]:
    """Return the names of each stage's modules in torchtitan's decoders."""
    kinds = [profile.classes[name].kind for name in profile.layer_classes]
    number = [kinds[:index].count("block") for index in range(len(kinds))]
    named = [f"layers.{number[i]}" if kind == "block" else _MODULES.get(kind, "") for i, kind in enumerate(kinds)]
    return [[named[index] for index in stage.layer_indices if named[index]] for stage in plan.stages]


def _checkpointing(plan: Plan, profile: ModelProfile) -> tuple[str, Loss]:
    blocks = [profile.classes[name].kind == "block" for name in profile.layer_classes]
    levels = [
        level
        for stage in plan.stages
        for index, level in zip(stage.layer_indices, stage.recompute_levels(), strict=True)
        if blocks[index]
    ]
    used = sorted(set(levels), key=levels.count)
    if len(used) == 1 and used[0] is not Recompute.SELECTIVE:
        return used[0].value, Loss("stages.recompute", "exact")
    strongest = "full" if Recompute.FULL in used else "selective"
    counts = ", ".join(f"{levels.count(level)} {level.value}" for level in sorted(used))
    note = f"every layer checkpoints in mode {strongest}, the plan has {counts}"
    if used == [Recompute.SELECTIVE]:
        note = "torchtitan's selective mode saves a list of operators, the plan recomputes the attention core alone"
    return strongest, Loss("stages.recompute", "approximated", note)


def _states(degrees: Degrees) -> Loss:
    if degrees.zero in (0, 2, 3) and not (degrees.zero == 0 and degrees.ep > 1):
        return Loss("degrees.zero", "exact")
    return Loss(
        "degrees.zero", "approximated", f"FSDP2 without resharding, which is ZeRO-2, instead of ZeRO-{degrees.zero}"
    )


def _vocabulary(degrees: Degrees) -> list[Loss]:
    if degrees.tp == 1 or degrees.vocab_parallel:
        return [Loss("degrees.vocab_parallel", "exact")]
    note = "torchtitan always divides the vocabulary with tensor parallelism; its logits are gathered for the loss"
    return [Loss("degrees.vocab_parallel", "approximated", note)]


def _recipe(plan: Plan, settings: dict[str, dict[str, object]]) -> str:
    lines = [
        f'"""{plan.model} on {plan.num_devices} devices of {plan.cluster.name}, for torchtitan."""',
        "",
        "from torchtitan.trainer import Trainer",
        "",
        f"WORLD_SIZE = {plan.num_devices}",
        "",
        "",
        "def apply(config: Trainer.Config) -> Trainer.Config:",
        '    """Return the configuration with the plan\'s parallelism, batch and activation checkpointing."""',
    ]
    for part, values in settings.items():
        lines += [f"    config.{part}.{name} = {value!r}" for name, value in values.items()]
    return "\n".join([*lines, "    return config", ""])


def _require(plan: Plan, profile: ModelProfile) -> None:
    degrees, spec = plan.stages[0].degrees, plan.schedule
    kinds = {profile.classes[name].kind for name in profile.layer_classes}
    shard = shard_degrees(degrees)[1]
    wrong = ""
    if any(stage.degrees != degrees for stage in plan.stages):
        wrong = "stages of different degrees"
    elif any(stage.layers is None for stage in plan.stages) or spec.edges or not profile.is_chain:
        wrong = "a graph of stages"
    elif spec.num_replicas > 1 or spec.num_slices > 1:
        wrong = f"{spec.name}: its ranks run several replicas of a stage, or slices of a sequence"
    elif degrees.etp > 1:
        wrong = f"experts divided over {degrees.etp} tensor-parallel devices"
    elif (shard * degrees.cp * degrees.tp) % degrees.ep:
        wrong = f"{degrees.ep} expert-parallel devices in dp_shard {shard} x cp {degrees.cp} x tp {degrees.tp}"
    elif not kinds <= {"embedding", "block", "norm", "head", "loss"}:
        wrong = f"layers of kind {', '.join(sorted(kinds - {'embedding', 'block', 'norm', 'head', 'loss'}))}"
    if wrong:
        raise NotExpressible(f"torchtitan has no settings for {wrong}", field="stages", hint="pin other degrees")
