"""Plan: everything the simulator, the runtime and the exporters need besides the profile.

Stages are virtual stages in model order: with v chunks on each of D pipeline ranks there are v * D of them, and
`schedule.placement` says which pipeline rank holds each. A pipeline rank is a set of dp x cp x tp devices; the mapping
gives each device its global rank.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.document import Bytes, Count, Document, Index, Name, Part, Seconds
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.profile import Recompute, Source
from stagewright.planner.errors import InvalidDocument

Axis = Literal["tp", "cp", "ep", "etp", "dp", "pp"]


class Degrees(Part):
    """Parallel degrees of one stage; expert layers regroup the same devices as ep x etp x (their own dp)."""

    dp: Count = 1
    tp: Count = 1
    cp: Count = 1
    ep: Count = 1
    etp: Count = 1
    sp: bool = False
    vocab_parallel: bool = False
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    ulysses: Count = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_devices % self.expert_split:
            raise ValueError(
                f"ep * etp = {self.ep} * {self.etp} must divide dp * cp * tp = {self.dp} * {self.cp} * {self.tp}"
            )
        if self.cp % self.ulysses:
            raise ValueError(f"ulysses {self.ulysses} must divide cp {self.cp}")
        return self

    @property
    def num_devices(self) -> int:
        """Devices of one pipeline rank, dp * cp * tp."""
        return self.dp * self.cp * self.tp

    @property
    def expert_split(self) -> int:
        """Devices that a layer's routed experts are divided over, ep * etp; with 1 each device has all of them whole."""
        return self.ep * self.etp


class RecomputeRun(Part):
    """The next `count` layers of the stage recompute at this level."""

    level: Recompute
    count: Count


class StagePlan(Part):
    """One virtual stage.

    Parameters
    ----------
    layers : (first, end) in the profile's layer order; for a DAG, `nodes` lists the layer indices instead.
    recompute : level by layer, run-length coded; none when empty.
    group : the cluster's node group that holds it.
    batch_shares : samples of a microbatch that each data-parallel replica takes, where they differ.
    state_shares : share of what ZeRO divides that each data-parallel replica holds, where they differ.
    optimizer_offload : share of the optimizer's states that lie in host memory between steps.
    """

    layers: tuple[Index, Index] | None = None
    nodes: tuple[Index, ...] | None = None
    degrees: Degrees = Degrees()
    recompute: tuple[RecomputeRun, ...] = ()
    group: Name | None = None
    batch_shares: tuple[Index, ...] = ()
    state_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    optimizer_offload: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.layers is None) == (self.nodes is None):
            raise ValueError("a stage has either layers or nodes")
        if self.layers is not None and self.layers[0] > self.layers[1]:
            raise ValueError(f"layers {self.layers[0]}..{self.layers[1]} end before they begin")
        covered = sum(run.count for run in self.recompute)
        if self.recompute and covered != self.num_layers:
            raise ValueError(f"recompute covers {covered} layers, the stage has {self.num_layers}")
        return self

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Indices of the stage's layers, in model order."""
        if self.nodes is not None:
            return self.nodes
        assert self.layers is not None
        return tuple(range(self.layers[0], self.layers[1]))

    @property
    def num_layers(self) -> int:
        return len(self.layer_indices)

    def holds(self, layer: int) -> bool:
        """Tell whether the layer of an index stands on the stage."""
        if self.nodes is not None:
            return layer in self.nodes
        assert self.layers is not None
        return self.layers[0] <= layer < self.layers[1]

    def recompute_levels(self) -> tuple[Recompute, ...]:
        """Return the level of each of the stage's layers."""
        if not self.recompute:
            return (Recompute.NONE,) * self.num_layers
        return tuple(run.level for run in self.recompute for _ in range(run.count))


class ScheduleSpec(Part):
    """The schedule by name and sizes; `orders` (the text of each rank's actions) for orders no generator makes.

    Parameters
    ----------
    name : a registry name, or "custom" with `orders`.
    num_ranks : pipeline ranks D.
    num_microbatches : T, per iteration and data-parallel replica.
    microbatch : samples of one microbatch on one data-parallel replica.
    placement : pipeline rank of each virtual stage, one row for each model replica.
    """

    name: Name
    num_ranks: Count
    num_microbatches: Count
    microbatch: Count
    num_chunks: Count = 1
    num_slices: Count = 1
    num_waves: Count | None = None
    placement: Annotated[tuple[tuple[Index, ...], ...], Field(min_length=1)]
    edges: tuple[tuple[Index, Index], ...] = ()
    parameters: dict[str, int | float | str] = {}
    orders: tuple[tuple[str, ...], ...] | None = None

    @property
    def num_replicas(self) -> int:
        """Model replicas inside one pipeline (2 for bidirectional schedules)."""
        return len(self.placement)

    @property
    def num_stages(self) -> int:
        return len(self.placement[0])


class RankMapping(Part):
    """Which global rank each coordinate has.

    Parameters
    ----------
    axis_order : axes from the fastest varying (adjacent ranks) to the slowest.
    pipeline_ranks : global ranks of each pipeline rank, in (tp fastest, cp, dp) order.
    """

    axis_order: tuple[Axis, ...] = ("tp", "cp", "dp", "pp")
    pipeline_ranks: Annotated[tuple[tuple[Index, ...], ...], Field(min_length=1)]

    @property
    def num_ranks(self) -> int:
        return sum(len(ranks) for ranks in self.pipeline_ranks)


class MemoryItems(Part):
    """Bytes on one device of one pipeline rank at its peak, by item."""

    parameters: Bytes = 0.0
    gradients: Bytes = 0.0
    optimizer: Bytes = 0.0
    weight_versions: Bytes = 0.0
    activations: Bytes = 0.0
    logits: Bytes = 0.0
    workspace: Bytes = 0.0
    communication: Bytes = 0.0
    fragmentation: Bytes = 0.0
    framework: Bytes = 0.0

    @property
    def total(self) -> float:
        """Sum of all items, bytes."""
        return float(sum(getattr(self, name) for name in type(self).model_fields))


class Expectation(Part):
    """What a run of the plan is expected to take beyond its simulation, in which everything takes its median.

    Parameters
    ----------
    step_time_s : the simulated step and the two parts below.
    message_s : what the step is longer because devices carry their own messages.
    jitter_s : what it is longer because no action takes just its median, and ranks wait for each other's longer ones.
    num_draws : simulations that the mean was taken over.
    peak_memory_bytes : of the fullest device of each pipeline rank, action by action: what lives beside an action and what the
        action needs. `Prediction.peak_memory_bytes` adds the most that lives and the largest workspace, which need not meet.
    """

    step_time_s: Seconds
    message_s: Seconds = 0.0
    jitter_s: float = 0.0
    num_draws: Index = 0
    peak_memory_bytes: tuple[Bytes, ...]


class Prediction(Part):
    """What the common simulator says of the plan.

    Parameters
    ----------
    step_time_s : one iteration, data-parallel reduction and optimizer included.
    peak_memory_bytes : of the fullest device of each pipeline rank.
    memory : the same peaks by item.
    bubble_over_total : idle over total, in the makespan convention.
    link_bytes : bytes sent in one iteration by link class and collective, over all devices.
    source : the worst provenance among the numbers used.
    expected_error : relative error to expect of the step time, when known.
    expectation : what a run should take; made for a run and by `stagewright simulate`. `step_time_s` is what a search
        minimises and proves, `peak_memory_bytes` what it holds against the devices.
    """

    step_time_s: Seconds
    tokens_per_s: Annotated[float, Field(ge=0)]
    samples_per_s: Annotated[float, Field(ge=0)]
    mfu: Annotated[float, Field(ge=0)] | None = None
    hfu: Annotated[float, Field(ge=0)] | None = None
    bubble_over_total: Annotated[float, Field(ge=0, le=1)]
    peak_memory_bytes: tuple[Bytes, ...]
    memory: tuple[MemoryItems, ...]
    stage_time_s: tuple[Seconds, ...] = ()
    exposed_communication_s: Seconds = 0.0
    optimizer_s: Seconds = 0.0
    link_bytes: dict[str, float] = {}
    tokens_per_dollar: float | None = None
    source: Source
    expected_error: float | None = None
    expectation: Expectation | None = None


class Certificate(Part):
    """What was proved, over which space.

    Parameters
    ----------
    status : optimal only where the gap is proved to be at most 1e-6 over the declared space.
    space : the declared space in words and numbers.
    objective, bound : objective of the plan and proven lower bound, in the unit of `objective_name`.
    gap : objective / bound - 1.
    any_order_bound : bound that holds for any order of the actions, `auto` included; None when not computed.
    candidates, evaluated, simulated : how many there were, were solved, were simulated.
    pruned : candidates removed, by the bound or constraint that removed them.
    proofs : what an independent checker needs: paths, multipliers, caps.
    """

    status: Literal["optimal", "within_gap", "feasible"]
    objective_name: Name
    space: dict[str, str | int | float | list[str] | list[int]]
    objective: float
    bound: float
    gap: Annotated[float, Field(ge=0)]
    any_order_bound: float | None = None
    candidates: Index
    evaluated: Index
    simulated: Index
    pruned: dict[str, int] = {}
    proofs: tuple[dict[str, object], ...] = ()


class Plan(Document):
    """A complete training plan."""

    document_name: ClassVar[str] = "plan"

    model: Name
    profile_digest: Name
    layer_digest: Name
    num_layers: Count
    cluster: Cluster
    job: TrainingJob
    planner: Name
    stages: Annotated[tuple[StagePlan, ...], Field(min_length=1)]
    mapping: RankMapping
    schedule: ScheduleSpec
    prediction: Prediction
    certificate: Certificate | None = None
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.stages) != self.schedule.num_stages:
            raise ValueError(
                f"stages has {len(self.stages)} entries, schedule.placement places {self.schedule.num_stages}"
            )
        self._check_layers()
        ranks = [rank for group in self.mapping.pipeline_ranks for rank in group]
        if sorted(ranks) != list(range(len(ranks))):
            raise ValueError(f"mapping.pipeline_ranks must hold each of the {len(ranks)} ranks once")
        if len(self.mapping.pipeline_ranks) != self.schedule.num_ranks:
            raise ValueError(
                f"mapping.pipeline_ranks has {len(self.mapping.pipeline_ranks)} groups, the schedule {self.schedule.num_ranks} ranks"
            )
        for row in self.schedule.placement:
            for index, (stage, rank) in enumerate(zip(self.stages, row, strict=False)):
                if rank >= self.schedule.num_ranks:
                    raise ValueError(
                        f"schedule.placement puts stage {index} on rank {rank} of {self.schedule.num_ranks}"
                    )
                devices = len(self.mapping.pipeline_ranks[rank])
                if stage.degrees.num_devices != devices:
                    raise ValueError(
                        f"stages[{index}].degrees: dp * cp * tp = {stage.degrees.num_devices}, but pipeline rank {rank} "
                        f"has {devices} devices"
                    )
        return self

    def _check_layers(self) -> None:
        covered = sorted(index for stage in self.stages for index in stage.layer_indices)
        if covered != list(range(self.num_layers)):
            raise ValueError(
                f"stages cover {len(covered)} layers, num_layers is {self.num_layers}; each must stand once"
            )

    @property
    def num_devices(self) -> int:
        return self.mapping.num_ranks

    @property
    def stage_of_layer(self) -> dict[int, int]:
        """The stage of each layer, by index."""
        return {layer: index for index, stage in enumerate(self.stages) for layer in stage.layer_indices}

    def check_profile(self, *, layer_digest: str, num_layers: int) -> None:
        """Raise InvalidDocument when the plan was made for a model with other layers."""
        if num_layers != self.num_layers:
            raise InvalidDocument(
                f"the plan is for {self.num_layers} layers, the profile has {num_layers}",
                field="num_layers",
                hint="plan again with this profile",
            )
        if layer_digest != self.layer_digest:
            raise InvalidDocument(
                f"the plan is for layers {self.layer_digest}, the profile has {layer_digest}",
                field="layer_digest",
                hint="plan again with this profile",
            )
