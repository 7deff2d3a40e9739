"""A plan as the command-line arguments of Megatron-LM (Megatron-Core 0.13 and later), one a line.

Stage boundaries are a `--pipeline-model-parallel-layout`: `E` embedding, `t` a transformer layer, `m` a prediction layer, `L`
the final norm, head and loss; `|` between virtual stages, which Megatron deals to pipeline ranks in turn. Megatron
runs 1F1B, interleaved when a rank holds several chunks; another order, a zero stage above 1 and recomputation that differs
between layers are approximated, and the losses say how.
"""

from __future__ import annotations

from itertools import groupby

from stagewright.formats.exported import Exported, Loss
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile, Recompute
from stagewright.planner.errors import NotExpressible

_AXIS_ORDERS = {("tp", "cp", "dp", "pp"): [], ("tp", "cp", "pp", "dp"): ["--use-tp-pp-dp-mapping"]}
_LETTERS = {"embedding": "E", "block": "t", "norm": "", "head": "L", "loss": ""}
FILE_NAME = "megatron_args.txt"


def megatron_args(plan: Plan, profile: ModelProfile) -> Exported:
    """Return the arguments, a line each.

    Raises
    ------
    NotExpressible : for stages that differ in degrees, a graph of stages, a placement that is no loop, or a model that is
        no decoder.
    """
    degrees = plan.stages[0].degrees
    _require(plan, profile)
    losses: list[Loss] = []
    lines = [
        f"--tensor-model-parallel-size {degrees.tp}",
        f"--pipeline-model-parallel-size {plan.schedule.num_ranks}",
        f"--context-parallel-size {degrees.cp}",
        f"--micro-batch-size {plan.schedule.microbatch}",
        f"--global-batch-size {plan.job.global_batch}",
        f"--seq-length {plan.job.sequence_length}",
    ]
    losses += [Loss(f"degrees.{name}", "exact") for name in ("dp", "tp", "cp", "ep", "etp")]
    if profile.architecture is not None and profile.architecture.num_experts:
        lines += [f"--expert-model-parallel-size {degrees.ep}", f"--expert-tensor-parallel-size {degrees.etp}"]
    if degrees.sp and degrees.tp > 1:
        lines.append("--sequence-parallel")
    losses.append(Loss("degrees.sp", "exact"))
    if degrees.tp > 1 and not degrees.vocab_parallel:
        losses.append(Loss("degrees.vocab_parallel", "approximated", "Megatron-LM always divides the vocabulary"))
    for part in (
        _pipeline(plan, profile),
        _states(degrees.zero),
        _recomputation(plan, profile),
        _mapping(plan),
        _precision(plan),
    ):
        lines += part[0]
        losses += part[1]
    if degrees.ulysses > 1:
        lines += [
            "--cp-comm-type a2a+p2p",
            f"--hierarchical-context-parallel-sizes {degrees.ulysses} {degrees.cp // degrees.ulysses}",
        ]
    lines += _model(profile)
    return Exported({FILE_NAME: "\n".join(lines) + "\n"}, tuple(losses))


def layout_text(plan: Plan, profile: ModelProfile) -> str:
    """Return the pipeline layout, runs of transformer layers shortened to `t*n`."""
    stages = []
    kinds = [profile.classes[name].kind for name in profile.layer_classes]
    classes = profile.layer_classes
    for stage in plan.stages:
        letters = ["m" if classes[index] == "prediction" else _LETTERS[kinds[index]] for index in stage.layer_indices]
        runs = [(letter, len(list(group))) for letter, group in groupby("".join(letters))]
        stages.append("".join(letter if count == 1 else f"{letter}*{count}" for letter, count in runs))
    return "|".join(stages)


def _require(plan: Plan, profile: ModelProfile) -> None:
    ranks = plan.schedule.num_ranks
    loop = tuple(stage % ranks for stage in range(len(plan.stages)))
    kinds = {profile.classes[name].kind for name in profile.layer_classes}
    wrong = ""
    if any(stage.degrees != plan.stages[0].degrees for stage in plan.stages):
        wrong = "stages of different degrees"
    elif any(stage.layers is None for stage in plan.stages) or plan.schedule.edges:
        wrong = "a graph of stages"
    elif plan.schedule.num_replicas > 1 or plan.schedule.placement[0] != loop:
        wrong = f"the placement {plan.schedule.placement[0]}: its stages are dealt to ranks in turn"
    elif not kinds <= set(_LETTERS):
        wrong = f"layers of kind {', '.join(sorted(kinds - set(_LETTERS)))}"
    if wrong:
        raise NotExpressible(
            f"Megatron-LM has no arguments for {wrong}", field="stages", hint="plan again with --target megatron-args"
        )


def _pipeline(plan: Plan, profile: ModelProfile) -> tuple[list[str], list[Loss]]:
    schedule = plan.schedule
    if schedule.num_ranks == 1:
        return [], [Loss("stages.layers", "exact"), Loss("schedule.name", "exact")]
    lines = [f"--pipeline-model-parallel-layout {layout_text(plan, profile)}"]
    runs = "1f1b" if schedule.num_chunks == 1 else "interleaved"
    if schedule.name in (runs, "dapple"):
        loss = Loss("schedule.name", "exact")
    else:
        loss = Loss("schedule.name", "approximated", f"Megatron-LM runs {runs} instead of {schedule.name}")
    return lines, [Loss("stages.layers", "exact"), loss]


def _states(zero: int) -> tuple[list[str], list[Loss]]:
    if zero <= 1:
        lines = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"] if zero else []
        return lines, [Loss("degrees.zero", "exact")]
    strategy = {2: "optim_grads", 3: "optim_grads_params"}[zero]
    lines = ["--use-megatron-fsdp", f"--data-parallel-sharding-strategy {strategy}", "--use-distributed-optimizer"]
    return lines, [Loss("degrees.zero", "approximated", f"Megatron-FSDP with {strategy}, which has units of its own")]


def _recomputation(plan: Plan, profile: ModelProfile) -> tuple[list[str], list[Loss]]:
    blocks = [profile.classes[name].kind == "block" for name in profile.layer_classes]
    stages = [
        [level for index, level in zip(stage.layer_indices, stage.recompute_levels(), strict=True) if blocks[index]]
        for stage in plan.stages
    ]
    used = {level for stage in stages for level in stage}
    if used <= {Recompute.NONE}:
        return [], [Loss("stages.recompute", "exact")]
    if used == {Recompute.FULL}:
        lines = ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
        return lines, [Loss("stages.recompute", "exact")]
    if used == {Recompute.SELECTIVE}:
        return ["--recompute-granularity selective"], [Loss("stages.recompute", "exact")]
    if Recompute.FULL not in used:
        note = "every layer recomputes its attention core, the plan does so in some"
        return ["--recompute-granularity selective"], [Loss("stages.recompute", "approximated", note)]
    count = max(stage.count(Recompute.FULL) for stage in stages)
    lines = ["--recompute-granularity full", "--recompute-method block", f"--recompute-num-layers {count}"]
    note = f"the first {count} layers of every stage recompute in full, the most that any stage needs"
    return lines, [Loss("stages.recompute", "approximated", note)]


def _mapping(plan: Plan) -> tuple[list[str], list[Loss]]:
    order = tuple(axis for axis in plan.mapping.axis_order if axis not in ("ep", "etp"))
    if order in _AXIS_ORDERS:
        return _AXIS_ORDERS[order], [Loss("mapping.axis_order", "exact")]
    return [], [Loss("mapping.axis_order", "approximated", f"ranks go tp, cp, dp, pp instead of {', '.join(order)}")]


def _precision(plan: Plan) -> tuple[list[str], list[Loss]]:
    precision = plan.job.precision
    lines = {"bf16": ["--bf16"], "fp16": ["--fp16"], "fp8": ["--bf16", "--fp8-format hybrid"], "fp32": []}
    if precision not in lines:
        raise NotExpressible(f"Megatron-LM does not train in {precision}", field="job.precision", hint="use bf16")
    return lines[precision], [Loss("job.precision", "exact")]


def _model(profile: ModelProfile) -> list[str]:
    """Return the arguments that name the model, as far as its architecture is known."""
    known = profile.architecture
    if known is None or not known.hidden_size:
        return []
    lines = [
        f"--num-layers {known.num_layers}",
        f"--hidden-size {known.hidden_size}",
        f"--num-attention-heads {known.num_heads}",
        f"--ffn-hidden-size {known.ffn_size or known.expert_ffn_size}",
        f"--max-position-embeddings {known.max_sequence_length}",
    ]
    if known.num_kv_heads and known.num_kv_heads != known.num_heads:
        lines += ["--group-query-attention", f"--num-query-groups {known.num_kv_heads}"]
    if known.gated_ffn:
        lines.append("--swiglu")
    if not known.tied_embeddings:
        lines.append("--untie-embeddings-and-output-weights")
    if known.num_experts:
        lines += [f"--num-experts {known.num_experts}", f"--moe-router-topk {known.experts_per_token}"]
    return lines
