"""Which degrees a model allows: divisibility of heads, experts, vocabulary, sequence, batch and devices.

Each rule answers with both numbers and the way out, or with None. Keys and values may be fewer than the tensor degree
if they divide it: each device then holds one whole head, replicated; not where queries, keys and values are one
projection (Falcon, Phi-3, DBRX).
"""

from __future__ import annotations

from stagewright.planner.cost.measured_cost import blend
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.operator import Architecture
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import LayerClass, ModelProfile


def legality(
    profile: ModelProfile, cluster: Cluster, job: TrainingJob, degrees: Degrees, microbatch: int
) -> str | None:
    """Return the first rule that the degrees break; None when they break none."""
    return (
        _batch(job, degrees, microbatch)
        or _world(cluster, degrees)
        or split_legality(profile, job, degrees, microbatch)
    )


def split_legality(profile: ModelProfile, job: TrainingJob, degrees: Degrees, microbatch: int) -> str | None:
    """Return the first rule of the model's own sizes that the degrees break."""
    architecture = profile.architecture or Architecture()
    return (
        _tensor(architecture, degrees)
        or _sequence(architecture, job, degrees)
        or _own_tokens(profile, degrees)
        or _experts(architecture, degrees)
        or _expert_layers(profile, degrees)
        or _measured(profile, job, degrees, microbatch)
    )


def _batch(job: TrainingJob, degrees: Degrees, microbatch: int) -> str | None:
    share = degrees.dp * microbatch
    if microbatch < 1:
        return f"microbatch is {microbatch}, it must be at least 1"
    if job.global_batch % share:
        return f"global batch {job.global_batch} does not divide by dp * microbatch = {degrees.dp} * {microbatch} = {share}"
    return None


def _world(cluster: Cluster, degrees: Degrees) -> str | None:
    if degrees.num_devices > cluster.num_devices:
        return (
            f"dp * cp * tp = {degrees.dp} * {degrees.cp} * {degrees.tp} = {degrees.num_devices} devices, "
            f"the cluster has {cluster.num_devices}"
        )
    return None


def _tensor(architecture: Architecture, degrees: Degrees) -> str | None:
    tp = degrees.tp
    if degrees.sp and tp == 1:
        return "sequence parallelism (sp on) splits over the tensor-parallel group and needs tp above 1"
    if tp == 1:
        return None
    heads, kv_heads = architecture.num_heads, architecture.num_kv_heads
    if heads and heads % tp:
        return f"{heads} attention heads do not divide by tp {tp}"
    if kv_heads and kv_heads % tp and architecture.fused_kv_heads:
        return (
            f"{kv_heads} key-value heads do not divide by tp {tp}: one projection makes queries, keys and values, "
            "in which no head is held by several devices"
        )
    if kv_heads and kv_heads % tp and tp % kv_heads:
        return f"{kv_heads} key-value heads neither divide by tp {tp} nor divide it"
    for name, size in (("feed-forward size", architecture.ffn_size), ("hidden size", architecture.hidden_size)):
        if size and size % tp:
            return f"{name} {size} does not divide by tp {tp}"
    vocabulary = architecture.vocab_size
    if degrees.vocab_parallel and vocabulary % tp:
        padded = -(-vocabulary // (128 * tp)) * 128 * tp
        return f"vocabulary {vocabulary} does not divide by tp {tp}; pad it to {padded}, or set vocab_parallel off"
    if architecture.family == "cnn":
        return f"tensor parallelism of convolutions is not modelled, tp is {tp}"
    return None


def _sequence(architecture: Architecture, job: TrainingJob, degrees: Degrees) -> str | None:
    length = job.sequence_length
    cp = degrees.cp
    if cp > 1:
        if architecture.family in ("cnn", "vision"):
            return f"a {architecture.family} model has no sequence to split, cp is {cp}"
        if length % cp:
            return f"sequence length {length} does not divide by cp {cp}"
    local = length // cp
    if degrees.sp and local % degrees.tp:
        return f"sequence length {length} / cp {cp} = {local} does not divide by tp {degrees.tp}, which sp needs"
    u = degrees.ulysses
    if u > 1 and architecture.num_heads:
        heads = architecture.num_heads // degrees.tp
        kv_heads = max(1, (architecture.num_kv_heads or architecture.num_heads) // degrees.tp)
        if heads % u or kv_heads % u:
            return f"ulysses {u} needs to divide the {heads} heads and {kv_heads} key-value heads that tp {degrees.tp} leaves"
    return None


def _own_tokens(profile: ModelProfile, degrees: Degrees) -> str | None:
    """Return the first layer whose own number of tokens (an image's patches) sequence parallelism does not divide."""
    if not degrees.sp:
        return None
    for name, layer in profile.classes.items():
        for operator in layer.operators if layer.kind == "block" else ():
            if operator.tokens_per_sample % degrees.tp:
                return (
                    f"the {operator.tokens_per_sample} tokens of layer class {name!r} do not divide by tp {degrees.tp}, "
                    "which sp needs"
                )
    return None


def _experts(architecture: Architecture, degrees: Degrees) -> str | None:
    experts = architecture.num_experts
    if degrees.expert_split == 1:
        return None
    if not experts:
        return f"the model has no experts, ep is {degrees.ep} and etp {degrees.etp}"
    if architecture.fused_experts:
        return f"all experts lie in the same tensors, which ep {degrees.ep} and etp {degrees.etp} do not divide"
    if architecture.biased_experts and degrees.etp > 1:
        return f"each expert adds a bias to its output, which etp {degrees.etp} would add as often"
    if experts % degrees.ep:
        return f"{experts} experts do not divide by ep {degrees.ep}"
    size = architecture.expert_ffn_size
    if size and size % degrees.etp:
        return f"expert feed-forward size {size} does not divide by etp {degrees.etp}"
    return None


def _expert_layers(profile: ModelProfile, degrees: Degrees) -> str | None:
    """Return the first layer whose own number of experts does not divide; layers may differ (pyramids)."""
    if degrees.ep == 1:
        return None
    for name, layer in profile.classes.items():
        for operator in layer.operators:
            if "ep" in operator.split and operator.num_groups > 1 and operator.num_groups % degrees.ep:
                return f"the {operator.num_groups} experts of layer class {name!r} do not divide by ep {degrees.ep}"
    return None


def _measured(profile: ModelProfile, job: TrainingJob, degrees: Degrees, microbatch: int) -> str | None:
    """Return the layer class that has neither a measured entry nor operators for this configuration."""
    for name, layer in profile.classes.items():
        if layer.operators:
            continue
        tp = degrees.tp if degrees.vocab_parallel or layer.kind not in ("embedding", "head", "loss") else 1
        if blend(layer, microbatch, job.sequence_length, tp) is None:
            return (
                f"layer class {name!r} was not measured at microbatch {microbatch}, sequence length "
                f"{job.sequence_length}, tensor degree {tp} (measured: {_configurations(layer)}) and has no operators"
            )
    return None


def _configurations(layer: LayerClass) -> str:
    keys = sorted({cost.key for cost in layer.costs})
    text = ", ".join(f"{size}/{length}/{degree}" for size, length, degree in keys[:6])
    return text + (" ..." if len(keys) > 6 else "")
