"""Random small problems for every planner, each made from one seed, and what is run of the answers."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stagewright.modeling import split
from stagewright.modeling.hugging_face import huggingface_model
from stagewright.planner.documents import (
    Cluster,
    ConfigurationCost,
    LayerClass,
    ModelProfile,
    Optimizer,
    Pedigree,
    Plan,
    Recompute,
    Source,
    TrainingJob,
)
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.models.hugging_face import profile_from_config
from stagewright.planner.planners.registry import planners
from stagewright.planner.planning import make_plan
from stagewright.planner.search.space import RULES
from stagewright.profiler.analytic_layers import over_layers
from stagewright.profiler.model_profile import profile_model
from stagewright.testing.mocked_cluster import cluster_factory, mixed_cluster_factory

LENGTH = 16
MICROBATCHES = (1, 8)  # of the measured grid; between them bytes are linear
ROOM_BYTES = 80e9
MOST_ATTEMPTS = 20
_TOKENS = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_TOKENS,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
# Not BERT and ViT, whose keys have biases apart: their gradient is zero in theory, and its rounding is compared as any other.
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_DECODER},
    "llama-tied": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        **_DECODER,
    },
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_DECODER},
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **_DECODER,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        **_NO_DROPOUT,
        **_TOKENS,
    },
    "t5": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 256,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    },
}
MODELS: Mapping[str, float] = {
    "gpt-tied": 3,
    "gpt-untied": 3,
    "llama": 3,
    "llama-tied": 1,
    "qwen2": 1,
    "mixtral": 3,
    "gpt2": 2,
    "t5": 1,
}
SPLITTABLE = ("llama", "llama-tied", "qwen2")  # whose shards are measured as a run divides them
EXACT = ("gpt-tied", "gpt-untied")  # their loss is computed in the model's own type
ANALYTIC = ("llama", "llama-tied", "qwen2", "mixtral")
NAMED = tuple(row.name for row in planners() if row.name not in ("exact", "exhaustive"))
BY_STAGE = tuple(row.name for row in planners() if row.by_stage and row.name != "exact")
SYNCHRONOUS = tuple(rule.name for rule in RULES)


@dataclass(frozen=True)
class Problem:
    """What a planner is asked; `room` is the share of what a plan with room takes that devices have, 0 for all they want."""

    seed: int
    model: str
    precision: str
    cluster: Cluster
    job: TrainingJob
    planner: str
    room: float = 0.0
    analytic: bool = False
    top: int = 3

    def text(self) -> str:
        """Return the problem in a line."""
        space = self.job.space
        told = space.model_dump(exclude_defaults=True, mode="json")
        groups = [
            f"{group.num_nodes}x{group.devices_per_node} {group.device.flops['fp32']:.3g} FLOP/s"
            for group in self.cluster.groups
        ]
        return (
            f"seed {self.seed}: {self.model} in {self.precision}, batch {self.job.global_batch}, "
            f"{self.job.optimizer.name}, {self.job.objective}, planner {self.planner} on {' + '.join(groups)}"
            f"{f', room {self.room:.2f}' if self.room else ''}{', analytic profile' if self.analytic else ''}, space {told}"
        )


def plan_text(plan: Plan) -> str:
    """Return a plan in a few lines."""
    spec = plan.schedule
    lines = [
        f"{spec.name}, {spec.num_ranks} ranks, {spec.num_microbatches} microbatches of {spec.microbatch}, "
        f"chunks {spec.num_chunks}, slices {spec.num_slices}, {spec.parameters}, placement {spec.placement}"
    ]
    for stage in plan.stages:
        own = stage.model_dump(exclude_defaults=True, exclude={"layers", "degrees", "recompute"})
        levels = [f"{run.count} {run.level.value}" for run in stage.recompute]
        lines.append(f"  {stage.layers} {stage.degrees.model_dump(exclude_defaults=True)} {levels} {own or ''}")
    return "\n".join(lines)


def draw(seed: int, attempt: int = 0) -> Problem:
    """Return a problem of a seed: most planners refuse some of what could be asked, so there are several."""
    rng = random.Random(f"{seed}/{attempt}")
    model = _chosen(rng, MODELS)
    precision = _chosen(rng, {"fp32": 5, "bf16": 3, "fp64": 4 if model in EXACT else 0})
    if model == "mixtral":
        precision = "fp32"  # torch groups matrix products up to 32 bits; in bf16 routers flip
    optimizer = _chosen(rng, {"adamw": 5, "adam": 1, "sgd": 1, "sgd-momentum": 2, "muon": 1.5, "shampoo": 1})
    num_devices = _chosen(rng, {2: 4, 4: 6, 8: 0.5})
    mixed = num_devices > 2 and rng.random() < 0.25
    cluster = _cluster(rng, num_devices, mixed=mixed)
    planner = "exact" if mixed or rng.random() < 0.6 else rng.choice(NAMED)
    by_stage = False
    if not mixed and rng.random() < 0.2:
        planner, by_stage = rng.choice(("exact", *BY_STAGE)), True
    objective = "step-time"
    if planner == "exact" and not mixed and not by_stage and rng.random() < 0.25:
        objective = rng.choice(("tokens-per-dollar", "fewest-devices", "min-max-memory", "frontier"))
    analytic = model in ANALYTIC and rng.random() < 0.5
    global_batch = rng.choice((4, 6, 8, 8, 12, 16))
    axes = ("tp",) * (analytic or model in SPLITTABLE) + ("cp",) * analytic + ("dp", "pp")
    space = _space(rng, num_devices, global_batch, planner, axes, by_stage=by_stage)
    if model == "mixtral" and analytic and rng.random() < 0.4:
        own = {"ep": rng.choice((2, 4))} if rng.random() < 0.7 else {"etp": 2, "tp": 2}
        space = space.model_copy(update={"pins": space.pins.model_copy(update=own)})
    if model == "t5":  # whose shared weight is gathered once more than is predicted
        space = space.model_copy(update={"zero": (0, 1), "pins": space.pins.model_copy(update={"zero": None})})
    job = TrainingJob(
        global_batch=global_batch,
        sequence_length=LENGTH,
        precision=precision,
        optimizer=Optimizer.standard(optimizer, precision),
        objective=objective,
        step_deadline_s=10.0 if objective == "fewest-devices" else None,
        space=space,
    )
    room = rng.uniform(0.35, 1.0) if rng.random() < 0.5 else 0.0
    return Problem(seed, model, precision, cluster, job, planner, room, analytic)


def _chosen(rng: random.Random, weights: Mapping[Any, float]) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


def _cluster(rng: random.Random, num_devices: int, *, mixed: bool) -> Cluster:
    def part(count: int, flops: float) -> Cluster:
        nodes = 2 if count > 2 and rng.random() < 0.4 else 1
        inside = 10 ** rng.uniform(8.0, 10.5)
        return cluster_factory(
            count // nodes,
            nodes,
            device=f"device-{flops:g}",
            memory_bytes=ROOM_BYTES,
            flops=flops,
            memory_bytes_per_s=4e9,
            price_per_hour=1.0,
            latency_s=10 ** rng.uniform(-6, -4),
            bytes_per_s=inside,
            node_latency_s=10 ** rng.uniform(-5, -4),
            node_bytes_per_s=inside / rng.uniform(1, 10),
        )

    if not mixed:
        return on_processors(part(num_devices, 1e9))
    first = rng.choice([count for count in (1, 2, 4, 6) if count < num_devices and (num_devices > 4 or count < 4)])
    parts = [part(first, 1e9), part(num_devices - first, 1e9 / rng.choice((1, 1.5, 2, 3)))]
    return on_processors(mixed_cluster_factory(parts, bytes_per_s=10 ** rng.uniform(8.0, 10.0)))


def on_processors(cluster: Cluster) -> Cluster:
    groups = tuple(
        group.model_copy(update={"device": group.device.model_copy(update={"kind": "cpu", "host_bytes_per_s": 10e9})})
        for group in cluster.groups
    )
    return cluster.model_copy(update={"groups": groups})


def _space(
    rng: random.Random, num_devices: int, global_batch: int, planner: str, axes: tuple[str, ...], *, by_stage: bool
) -> SearchSpace:
    pins: dict[str, object] = {}
    if rng.random() < 0.6:
        left = num_devices
        for name in rng.sample(axes, rng.choice((1, 1, 2))):
            sizes = [size for size in (1, 2, 4) if left % size == 0 and (name != "dp" or global_batch % size == 0)]
            pins[name] = rng.choice(sizes)
            left //= int(pins[name])
    if rng.random() < 0.2:
        pins["zero"] = rng.choice((1, 2, 3))
    if rng.random() < 0.15:
        pins["recompute"] = rng.choice((Recompute.SELECTIVE, Recompute.FULL))
    if rng.random() < 0.1 and pins.get("dp") != 4:
        pins["microbatch"] = rng.choice((1, 2))
    if pins.get("tp", 1) > 1 and rng.random() < 0.3:
        pins["sp"] = rng.choice(("on", "off"))
    if pins.get("tp", 1) > 1 and rng.random() < 0.3:
        pins["vocab_parallel"] = rng.choice(("on", "off"))
    schedules: tuple[str, ...] = ()
    if planner == "exact" and rng.random() < 0.4:
        pins["schedule"] = rng.choice(SYNCHRONOUS)
    elif planner == "exact" and rng.random() < 0.3:
        schedules = tuple(rng.sample(SYNCHRONOUS, 3))
    return SearchSpace(
        pins=Pins(**pins),
        schedules=schedules,
        zero=rng.choice(((0, 1, 2, 3), (0, 1, 2, 3), (0,), (1, 3), (2, 3))) if "zero" not in pins else (0, 1, 2, 3),
        max_chunks=rng.choice((2, 2, 4)),
        per_stage_degrees=by_stage,
        synchronous_only=planner == "exact" or rng.random() < 0.5,
        memory_headroom=rng.choice((0.05, 0.05, 0.0)),
    )


class Models:
    """The models of problems and their profiles, kept in a folder.

    Profiles are measured for their bytes. Their seconds are made anew for each seed, so that it always has the same plans.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._measured: dict[tuple[str, str], ModelProfile] = {}

    def reference(self, name: str) -> str:
        """Return what `stagewright run --model` is told."""
        if name not in CONFIGS:
            return f"{Path(__file__).parent / 'planned_models.py'}:{name.partition('-')[2]}"
        path = self._folder / name / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(CONFIGS[name]))
        return str(path)

    def profile_of(self, problem: Problem) -> ModelProfile:
        """Return the profile that a problem is planned with."""
        if problem.analytic:
            return self._analytic(problem.model)
        rng = random.Random(problem.seed)
        known = self.measured(problem.model, problem.precision)
        classes = {}
        for name, layer in known.classes.items():
            second = rng.uniform(0.5, 2.0) * (1e-3 if layer.kind == "block" else 3e-4)
            costs = tuple(_retimed(layer, cost, second) for cost in layer.costs)
            classes[name] = layer.model_copy(update={"costs": costs})
        update = {
            "classes": classes,
            "step_overhead_s": 0.0,
            "action_overhead_s": 1e-5,
            "entrance_s": 0.0,
            "copy_bytes_per_s": 5e9,
            "jitter": None,
            "pedigree": Pedigree(device="mocked"),
        }
        return known.model_copy(update=update)

    def _analytic(self, name: str) -> ModelProfile:
        """Return the analytic profile of a configuration over the layers of the model that runs."""
        return over_layers(profile_from_config(CONFIGS[name], name), split(huggingface_model(self.reference(name))))

    def measured(self, name: str, precision: str) -> ModelProfile:
        """Return the profile of a model as it was measured."""
        if (name, precision) not in self._measured:
            self._measured[name, precision] = profile_model(
                self.reference(name),
                microbatches=MICROBATCHES,
                sequence_length=LENGTH,
                tensor_degrees=(1, 2) if name in SPLITTABLE else (1,),
                device="cpu",
                dtype=precision,
                budget_s=0.0,
                cache=self._folder / "cache",
            )
        return self._measured[name, precision]


def _retimed(layer: LayerClass, cost: ConfigurationCost, second: float) -> ConfigurationCost:
    share = cost.microbatch**0.9 / cost.tensor_degree**0.9 * second
    levels = {level: {"full": 1.0, "selective": 0.2}[level.value] * share for level in cost.recompute_s}
    return cost.model_copy(
        update={
            "forward_s": share,
            "input_grad_s": 1.1 * share,
            "weight_grad_s": 0.8 * share,
            "split_excess_s": 0.03 * share,
            "recompute_s": levels,
            "optimizer_s": layer.parameters * 2e-9 / cost.tensor_degree,
            "source": Source.MOCKED,
            "sources": {},
            "spread": {},
        }
    )


def answered(seed: int, models: Models) -> tuple[Problem, ModelProfile, PlanOutcome]:
    """Return the first problem of a seed that has an answer, with its profile and the answer."""
    for attempt in range(MOST_ATTEMPTS):
        problem = draw(seed, attempt)
        profile = models.profile_of(problem)
        try:
            problem, outcome = solve(problem, profile)
        except InvalidArgument:  # the planner does not search this
            continue
        if outcome.plan is not None:
            return problem, profile, outcome
    raise AssertionError(f"no problem of seed {seed} has an answer")


def solve(problem: Problem, profile: ModelProfile) -> tuple[Problem, PlanOutcome]:
    """Return the planner's answer, and the problem with the memory that its devices have in the end."""
    found = _asked(problem, profile)
    if not problem.room or found.plan is None:
        return problem, found
    room = problem.room
    for _ in range(6):
        tight = replace(problem, cluster=_with_memory(problem.cluster, room * max(_peaks(found.plan))), room=room)
        again = _asked(tight, profile)
        if again.plan is not None:
            return tight, again
        room = room**0.5
    return problem, found


def _asked(problem: Problem, profile: ModelProfile) -> PlanOutcome:
    return make_plan(
        profile, problem.cluster, problem.job, planner=problem.planner, top=problem.top, deadline_s=60.0, gap=0.02
    )


def _peaks(plan: Plan) -> tuple[float, ...]:
    return plan.prediction.peak_memory_bytes


def _with_memory(cluster: Cluster, memory_bytes: float) -> Cluster:
    groups = tuple(
        group.model_copy(update={"device": group.device.model_copy(update={"memory_bytes": memory_bytes})})
        for group in cluster.groups
    )
    return cluster.model_copy(update={"groups": groups})


def plans_of(outcome: PlanOutcome) -> list[Plan]:
    """Return every plan of an answer once."""
    plans = [outcome.plan, *(other.plan for other in outcome.alternatives), *(each.plan for each in outcome.frontier)]
    unlike: dict[str, Plan] = {}
    for plan in plans:
        if plan is not None:
            unlike.setdefault(plan_text(plan), plan)
    return list(unlike.values())
