"""Which plans the runtime executes. Anything else is refused before a rank starts, never run as something similar."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from stagewright.planner.cost.matrix_optimizer import MATRIX_OPTIMIZERS
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.layerwise import is_layerwise
from stagewright.planner.link_bytes import shared_weights
from stagewright.planner.planned_devices import device_of
from stagewright.planner.replica_shares import has_uneven_shares, parts_of_stage, samples_by_replica
from stagewright.planner.schedules.registry import families
from stagewright.runtime.sequence_pieces import num_pieces
from stagewright.runtime.topology import has_unequal_replicas, has_unequal_tensors

PRECISIONS = ("fp64", "fp32", "bf16", "fp16")


def check_supported(plan: Plan) -> None:
    """Raise InvalidArgument naming the field of the plan that the runtime does not execute."""
    reason = next((row.not_run for row in families() if row.name == plan.schedule.name), "")
    if reason:
        raise InvalidArgument(
            f"schedule {plan.schedule.name} is planned and simulated, and not run: {reason}",
            field="schedule.name",
            hint="take 1f1b; --pin vocab_parallel=on cuts the output layer over a tensor-parallel group",
        )
    for index, stage in enumerate(plan.stages):
        if stage.optimizer_offload:
            _check_offload(plan, index)
        if stage.state_shares:
            _check_state_shares(plan, index)
        if has_uneven_shares(plan):
            _check_shares(plan, index)
    if is_layerwise(plan):
        _check_layerwise(plan)
    else:
        _check_ranks(plan)
        if has_unequal_replicas(plan) or has_unequal_tensors(plan):
            _check_unequal(plan)
    cp = max(stage.degrees.cp for stage in plan.stages)
    if cp > 1 and plan.schedule.num_slices > 1:
        raise InvalidArgument(
            f"cp is {cp} and num_slices {plan.schedule.num_slices}, a sequence is divided one way only",
            field="schedule.num_slices",
        )
    if plan.job.precision not in PRECISIONS:
        raise InvalidArgument(
            f"the runtime does not train in {plan.job.precision}", field="job.precision", hint=", ".join(PRECISIONS)
        )
    if plan.job.optimizer.name in MATRIX_OPTIMIZERS:
        _check_matrices(plan)
    _check_autocast(plan)
    _check_versions(plan)


def _is_asynchronous(plan: Plan) -> bool:
    """Whether weights change under the microbatches."""
    return any(row.name == plan.schedule.name and not row.synchronous for row in families())


def _check_versions(plan: Plan) -> None:
    """Versions of weights: no order holds reductions of their gradients over replicas."""
    sizes = [(stage.degrees.dp, stage.degrees.cp) for stage in plan.stages]
    if _is_asynchronous(plan) and any(dp * cp > 1 for dp, cp in sizes):
        raise InvalidArgument(
            f"stages have (dp, cp) {sizes} under {plan.schedule.name}, whose weights change under the microbatches; the runtime "
            "takes one device of each there",
            field="stages.degrees.dp",
            hint="take dp = 1 and cp = 1, or a synchronous schedule; pipedream takes `replicas` by stage",
        )


def _check_matrices(plan: Plan) -> None:
    """Optimizers of whole matrices: one version of the weights."""
    if _is_asynchronous(plan):
        raise InvalidArgument(
            f"optimizer {plan.job.optimizer.name} with {plan.schedule.name}: the runtime takes it under synchronous schedules",
            field="job.optimizer.name",
            hint="plan with --optimizer adamw, or a synchronous schedule",
        )


def _check_offload(plan: Plan, index: int) -> None:
    """States on the host: a step of single elements, once an iteration."""
    name, told = plan.job.optimizer.name, plan.schedule.parameters
    if name in MATRIX_OPTIMIZERS or "local_steps" in told or _is_asynchronous(plan):
        raise InvalidArgument(
            f"stages[{index}].optimizer_offload is {plan.stages[index].optimizer_offload} with {name}, {plan.schedule.name} and "
            f"parameters {sorted(told)}; the runtime streams states of elementwise optimizers, once in a synchronous iteration",
            field=f"stages[{index}].optimizer_offload",
            hint="take adamw, adam or sgd-momentum, a synchronous schedule and no local_steps, or keep the states on the device",
        )


def _check_layerwise(plan: Plan) -> None:
    """Layers of one rank with degrees of their own: replicas and tensor degrees, equal microbatches, whole sequences."""
    told = sorted({"halved", "local_steps", "updates", "pipelines", "slice_lengths"} & set(plan.schedule.parameters))
    if told or plan.schedule.num_slices > 1 or len(plan.schedule.placement) > 1 or plan.schedule.name == "dynapipe":
        raise InvalidArgument(
            f"schedule {plan.schedule.name} has {plan.schedule.num_slices} slices, {len(plan.schedule.placement)} model replicas and "
            f"parameters {told}; layers with degrees of their own take equal microbatches of whole sequences, one direction and "
            "one number of steps",
            field="schedule",
            hint="take `layerwise_schedule`",
        )
    for index, stage in enumerate(plan.stages):
        degrees = stage.degrees
        rest = degrees.cp * degrees.expert_split
        if rest > 1 or stage.batch_shares or stage.state_shares:
            raise InvalidArgument(
                f"stages[{index}] has {degrees.model_dump(exclude_defaults=True)}, batch_shares {list(stage.batch_shares)} and "
                f"state_shares {list(stage.state_shares)}; layers with degrees of their own take dp, tp, sp, vocab_parallel and zero, "
                "and even shares",
                field=f"stages[{index}].degrees",
                hint="pin cp=1, ep=1 and etp=1, and leave the shares out",
            )


def check_layerwise_model(plan: Plan, profile: ModelProfile) -> None:
    """Raise InvalidArgument where layers with degrees of their own are no chain."""
    if not is_layerwise(plan):
        return
    if profile.edges is not None:
        raise InvalidArgument(
            f"{profile.name} is no chain, its layers have degrees of their own",
            field="stages",
            hint="plan without --per-stage-degrees",
        )


def check_split_logits(plan: Plan, profile: ModelProfile) -> None:
    """Raise InvalidArgument where a loss is to be computed on logits that are split otherwise than its head splits them."""
    kinds = [profile.classes[name].kind for name in profile.layer_classes]
    for index, (stage, following) in enumerate(pairwise(plan.stages)):
        layer = following.layer_indices[0]
        split = {each.degrees.tp if each.degrees.vocab_parallel else 1 for each in (stage, following)}
        if len(split) > 1 and (kinds[layer - 1], kinds[layer]) == ("head", "loss"):
            raise InvalidArgument(
                f"stages {index} and {index + 1} have {stage.degrees.model_dump(exclude_defaults=True)} and "
                f"{following.degrees.model_dump(exclude_defaults=True)}; a head with vocab_parallel keeps its degrees up to the loss",
                field=f"stages[{index + 1}].degrees",
                hint="give head and loss one stage, or pin vocab_parallel=off",
            )


def _check_ranks(plan: Plan) -> None:
    """Stages of one rank divide samples, tensors, sequences and experts alike."""
    names = ("dp", "tp", "sp", "cp", "ulysses", "ep", "etp")
    for rank in range(plan.schedule.num_ranks):
        held = sorted({s for row in plan.schedule.placement for s, at in enumerate(row) if at == rank})
        found = {tuple(getattr(plan.stages[stage].degrees, name) for name in names) for stage in held}
        if len(found) > 1:
            raise InvalidArgument(
                f"stages {held} stand on pipeline rank {rank}, with ({', '.join(names)}) {sorted(found)}; the runtime takes stages "
                "of one rank that differ in zero and vocab_parallel, or in all of these where one rank holds all stages",
                field=f"stages[{held[-1]}].degrees",
                hint="plan with equal degrees for all stages of a rank",
            )


def _check_unequal(plan: Plan) -> None:
    """Stages of different replicas, tensor or context degrees: whole microbatches of one size, one direction."""
    stated = sorted({"halved", "local_steps", "slice_lengths"} & set(plan.schedule.parameters))
    if stated or plan.schedule.name == "dynapipe" or len(plan.schedule.placement) > 1:
        raise InvalidArgument(
            f"stages have {[stage.degrees.dp for stage in plan.stages]} replicas of tp "
            f"{[stage.degrees.tp for stage in plan.stages]} and cp {[stage.degrees.cp for stage in plan.stages]}, "
            f"{plan.schedule.name} on {len(plan.schedule.placement)} model replicas and parameters {stated}; the runtime takes them "
            "with one direction and equal microbatches",
            field="stages.degrees.dp",
            hint="plan with equal degrees for all stages",
        )
    if has_unequal_tensors(plan) and (plan.schedule.edges or plan.schedule.num_slices > 1):
        raise InvalidArgument(
            f"stages have tp {[stage.degrees.tp for stage in plan.stages]}, sp {[stage.degrees.sp for stage in plan.stages]} and cp "
            f"{[stage.degrees.cp for stage in plan.stages]}; {plan.schedule.name} has edges {plan.schedule.edges} and "
            f"{plan.schedule.num_slices} slices; the runtime takes whole sequences and stages in a line there",
            field="stages.degrees",
            hint="take a schedule without slices and edges, or equal degrees for all stages",
        )
    num_pieces(plan)
    for index in range(len(plan.stages)):
        samples_by_replica(plan, index)


def check_shared_weights(plan: Plan, profile: ModelProfile) -> None:
    """Raise InvalidArgument where stages share a weight that differ in tensor degrees, or have versions of it."""
    names = ("tp", "vocab_parallel", *(("sp",) if is_layerwise(plan) else ()))
    for tie in shared_weights(plan, profile):
        if len(tie.stages) > 1 and _is_asynchronous(plan):
            raise InvalidArgument(
                f"stages {sorted(tie.stages)} share a weight, and {plan.schedule.name} changes weights under the microbatches; no "
                "order holds a sum of their gradients",
                field="schedule.name",
                hint="untie the weight, or take a synchronous schedule",
            )
        degrees = {tuple(getattr(plan.stages[stage].degrees, name) for name in names) for stage in tie.stages}
        if len(degrees) > 1:
            raise InvalidArgument(
                f"stages {sorted(tie.stages)} share a weight, with ({', '.join(names)}) {sorted(degrees)}; the runtime sums its "
                "gradients over devices that hold the same part of it",
                field="stages.degrees.tp",
                hint="plan with equal tp for these stages, or untie the weight",
            )


def _check_shares(plan: Plan, index: int) -> None:
    """Replicas with shares of their own: whole sequences of equal microbatches, every expert on each of them."""
    degrees, told = plan.stages[index].degrees, plan.schedule.parameters
    stated = sorted({"halved", "local_steps", "slice_lengths", "updates", "pipelines"} & set(told))
    if degrees.expert_split > 1 or stated or plan.schedule.name == "dynapipe":
        raise InvalidArgument(
            f"stages[{index}].batch_shares is {list(plan.stages[index].batch_shares)} with ep {degrees.ep}, etp {degrees.etp}, "
            f"{plan.schedule.name} and parameters {stated}; the runtime takes uneven shares without split experts and with "
            "equal microbatches",
            field=f"stages[{index}].batch_shares",
            hint="pin ep=1, or plan on one kind of device",
        )
    samples_by_replica(plan, index)


def _check_state_shares(plan: Plan, index: int) -> None:
    """Uneven shares of states: one for each replica, over all replicas."""
    told = sorted({"shard_size", "local_steps"} & set(plan.schedule.parameters))
    parts_of_stage(plan, index)
    if told:
        raise InvalidArgument(
            f"stages[{index}].state_shares is {list(plan.stages[index].state_shares)} with parameters {told}; the runtime shares "
            "states out over all replicas",
            field=f"stages[{index}].state_shares",
            hint="leave shard_size and local_steps out, or leave the shares out",
        )


def _check_autocast(plan: Plan) -> None:
    told = plan.schedule.parameters.get("autocast")
    if told is None:
        return
    if told != "bf16" or plan.job.precision != "fp32":
        raise InvalidArgument(
            f"autocast is {told} with weights in {plan.job.precision}, the runtime takes bf16 over fp32",
            field="schedule.parameters.autocast",
            hint="take bf16 and a plan in fp32, or leave autocast out",
        )


def check_memory(plan: Plan, peak_memory_bytes: Sequence[float]) -> None:
    """Raise InvalidArgument when a pipeline rank's predicted peak exceeds the memory of its device."""
    for rank, peak in enumerate(peak_memory_bytes):
        stage = next(s for row in plan.schedule.placement for s, holder in enumerate(row) if holder == rank)
        memory = device_of(plan.cluster, plan.stages[stage].group).memory_bytes
        if peak > memory:
            raise InvalidArgument(
                f"pipeline rank {rank} needs {peak / 2**30:.1f} GiB, its device has {memory / 2**30:.1f}",
                field="memory",
                hint="plan again for this cluster, recompute more layers, or emulate the plan with --emulate",
            )


def check_devices(plan: Plan) -> None:
    """Raise InvalidArgument when the plan's devices are accelerators and torch sees none on this machine."""
    kinds = {group.device.kind: group.device.name for group in plan.cluster.groups}
    if "cuda" in kinds and not torch.cuda.is_available():
        raise InvalidArgument(
            f"the plan is for {kinds['cuda']}, and torch sees no CUDA device here",
            field="cluster",
            hint="run it where they are, plan with --cluster local, or take --emulate, whose actions only wait",
        )


def check_world(plan: Plan, torchrun_arguments: Sequence[str]) -> None:
    """Raise InvalidArgument when torchrun is told another number of ranks than the plan has."""
    told = dict(
        argument.lstrip("-").replace("_", "-").split("=", 1) for argument in torchrun_arguments if "=" in argument
    )
    each, nodes = told.get("nproc-per-node"), told.get("nnodes", "1")
    if each is None or not each.isdecimal() or not nodes.isdecimal():
        return
    if int(each) * int(nodes) != plan.num_devices:
        raise InvalidArgument(
            f"torchrun is told {nodes} nodes x {each} ranks = {int(each) * int(nodes)}, the plan has {plan.num_devices}",
            field="nproc-per-node",
            hint="leave it out, or plan for that many devices",
        )
