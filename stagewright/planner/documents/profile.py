"""ModelProfile: the layers of a model and what each costs, with a provenance for every number.

Layers are listed in a topological order of the model's graph. Repeated layers are declared once with a count; their
names hold `{}` where the index goes. Costs stand in a layer's class, one entry for each configuration that was
measured (or derived): microbatch, sequence length, tensor degree.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from math import prod
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stagewright.planner.documents.document import (
    Bytes,
    Count,
    Document,
    Index,
    Name,
    Part,
    Rate,
    Seconds,
    canonical_json,
    digest_of,
)
from stagewright.planner.documents.operator import Architecture, Operator

MOST_LAYERS = 100_000

FreedShare = Annotated[float, Field(le=1, allow_inf_nan=False)]


class Source(StrEnum):
    """Where a number comes from, best first."""

    MEASURED = "measured"
    FITTED = "fitted"
    ANALYTIC = "analytic"
    MOCKED = "mocked"


class Recompute(StrEnum):
    """How much of a layer's forward is run again in its backward."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class Jitter(Part):
    """How unsteadily a device computes: the seconds of pieces of work, over the median of the same piece.

    Slow changes of speed are not in them, only what differs from one piece to the next.

    Parameters
    ----------
    piece_s : how long such a piece takes; longer work is several pieces one after the other.
    ratios : ascending, each of as many pieces as the others, so that their mean is the mean of all pieces.
    """

    piece_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ratios: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.ratios) != sorted(self.ratios):
            raise ValueError("ratios must ascend")
        return self


class Collective(Part):
    """One collective that a layer issues for each microbatch.

    `payload_bytes` is the size of the full tensor: the reduced one for an all-reduce, the gathered one for all-gather
    and reduce-scatter, one rank's send buffer for all-to-all, the message for send-receive. One of statistics remains what it is
    under sequence parallelism, where a sum of activations is a scatter and a gather. One of the vocabulary is issued where a plan
    splits that, and remains what it is too. `count_again` of a forward's are issued once more by full recomputation; where it is
    not known, all but the last sum over the tensor group.
    """

    phase: Literal["forward", "backward"]
    operation: Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send-receive"]
    group: Literal["tp", "cp", "ep", "dp"]
    payload_bytes: Bytes
    count: Count = 1
    of_statistics: bool = False
    of_vocabulary: bool = False
    count_again: Index | None = None


class BackwardPhase(Part):
    """A part of a layer's backward that makes all gradients anew, up to where those of one kind are complete and leave.

    Parameters
    ----------
    ends_with : whose gradients leave at its end: routed experts', all others', or none behind the last of them.
    begin_bytes : what is there as it begins, beside what the layers before keep and gradients of this layer.
    peak_bytes : the highest use, beside what the layers before keep and gradients that have left.
    """

    ends_with: Literal["experts", "others", "none"]
    begin_bytes: Bytes
    peak_bytes: Bytes


class ConfigurationCost(Part):
    """Costs of one layer for one microbatch in one configuration, on one device.

    Parameters
    ----------
    microbatch, sequence_length, tensor_degree : the configuration; compute and bytes are those of one shard.
    forward_s, input_grad_s, weight_grad_s : compute seconds without communication; of a backward that runs in one piece.
    split_excess_s : what input and weight gradient take longer than that where they run apart.
    recompute_s : seconds added to the backward by each recomputation level above none.
    activation_bytes : bytes kept from the forward until the backward, by recomputation level.
    freed_at_input_grad : share of them given back at the end of the input gradient, by level; negative where the weight
        gradient waits with more than the forward kept. A level that is not named holds what level none holds then: what
        is recomputed waits too.
    workspace_bytes : highest temporary use of the forward and of a backward in one piece, above what is kept.
    forward_workspace_bytes : that of the forward alone, by recomputation level; none where it was not measured.
    input_grad_workspace_bytes : that of an input gradient that runs apart, above the larger of what is kept and what waits for the
        weight gradient; weight_grad_workspace_bytes : that of the weight gradient, above what waits. None where not measured.
    backward_phases : the same, phase by phase, of a backward whose gradients come and go as under ZeRO-2 and 3; none where
        they were not measured.
    output_bytes : the boundary tensor sent to the next layer.
    unkept_input_bytes : of the tensors that the layer is given, those that are not among what it keeps: a stage that begins with
        the layer holds them beside that, unless it recomputes the whole layer. None where nobody looked.
    forward_flops : matrix-product FLOP of the forward of the whole (unsharded) layer.
    optimizer_s : optimizer step of the shard's parameters.
    collectives : what the shards exchange.
    source : provenance of every number here that `sources` does not name.
    sources : provenance of single fields that differ.
    spread : 20th and 80th percentile of measured fields.
    """

    microbatch: Count
    sequence_length: Count
    tensor_degree: Count = 1
    forward_s: Seconds
    input_grad_s: Seconds
    weight_grad_s: Seconds
    split_excess_s: Seconds = 0.0
    recompute_s: dict[Recompute, Seconds] = {}
    activation_bytes: dict[Recompute, Bytes]
    freed_at_input_grad: dict[Recompute, FreedShare] = {}
    workspace_bytes: Bytes = 0.0
    forward_workspace_bytes: dict[Recompute, Bytes] = {}
    input_grad_workspace_bytes: Bytes | None = None
    weight_grad_workspace_bytes: Bytes | None = None
    backward_phases: tuple[BackwardPhase, ...] = ()
    output_bytes: Bytes
    unkept_input_bytes: Bytes | None = None
    forward_flops: Annotated[float, Field(ge=0)] = 0.0
    optimizer_s: Seconds = 0.0
    collectives: tuple[Collective, ...] = ()
    source: Source
    sources: dict[str, Source] = {}
    spread: dict[str, tuple[Seconds, Seconds]] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if Recompute.NONE not in self.activation_bytes:
            raise ValueError("activation_bytes needs the level 'none'")
        if self.forward_workspace_bytes and self.forward_workspace_bytes.keys() != self.activation_bytes.keys():
            raise ValueError(
                f"forward_workspace_bytes has the levels {sorted(self.forward_workspace_bytes)}, "
                f"activation_bytes {sorted(self.activation_bytes)}"
            )
        for name in (*self.sources, *self.spread):
            if name not in type(self).model_fields:
                raise ValueError(f"sources and spread name fields of this entry, {name!r} is none")
        return self

    @property
    def key(self) -> tuple[int, int, int]:
        """(microbatch, sequence_length, tensor_degree)."""
        return (self.microbatch, self.sequence_length, self.tensor_degree)


class WeightTensor(Part):
    """A run of trainable tensors of one shape in a layer.

    Parameters
    ----------
    shape : of the whole tensor.
    count : how many of them follow each other.
    is_matrix : optimizers of whole matrices take it for one, or for a stack of them.
    of_experts : it belongs to routed experts.
    """

    shape: tuple[Count, ...]
    count: Count = 1
    is_matrix: bool = False
    of_experts: bool = False

    @property
    def num_elements(self) -> int:
        """Return the elements of one."""
        return prod(self.shape)

    @property
    def num_matrices(self) -> int:
        """Return the matrices in one: those of a stack, else 1."""
        return prod(self.shape[:-2])


class LayerClass(Part):
    """What all layers of one shape share.

    Parameters
    ----------
    kind : the layer's role; embedding, head and loss are layers too.
    parameters : trainable parameters of the whole layer.
    replicated_parameters : of these, how many tensor parallelism does not split (norms, biases of row-split layers).
    expert_parameters : of these, how many belong to routed experts, split by the expert groups.
    summed_parameters : of these, how many are whole on each device and work on what tensor parallelism leaves it (norms of heads),
        in a measured layer.
    vocabulary_parameters : of these, how many are split where a plan splits the vocabulary, in a measured layer that is neither
        embedding nor head (the embedding of a decoder that is one layer).
    unused_parameters : of these, how many no forward uses. A plain loop makes neither gradients nor optimizer states for
        them; a run's buffers hold theirs like all others'.
    tensors : the shapes of its trainable tensors in their order, where they are known: what an optimizer's step holds for a time,
        and where ZeRO cuts them for one that needs whole matrices.
    costs : measured or derived entries, at most one for each configuration; may be empty when `operators` are given.
    operators : the layer's operators for the analytic model.
    backward : what of the backward runs: all of it; `input` where the layer's weights are frozen and layers before it are
        trained; `none` where nothing before it is trained either. Costs and parameters are those of the trained layer.
    frozen_from : the class that the layer had before it was frozen.
    """

    kind: Literal["embedding", "block", "norm", "head", "loss", "convolution", "pooling", "other"]
    parameters: Index
    replicated_parameters: Index = 0
    expert_parameters: Index = 0
    summed_parameters: Index = 0
    vocabulary_parameters: Index = 0
    unused_parameters: Index = 0
    tensors: tuple[WeightTensor, ...] = ()
    costs: tuple[ConfigurationCost, ...] = ()
    operators: tuple[Operator, ...] = ()
    backward: Literal["full", "input", "none"] = "full"
    frozen_from: Name | None = None

    @property
    def is_trained(self) -> bool:
        return self.backward == "full"

    def whole_parameters(self, *, splits_vocabulary: bool) -> int:
        """Return how many parameters tensor parallelism leaves whole where a plan splits the vocabulary or does not."""
        return self.replicated_parameters + (0 if splits_vocabulary else self.vocabulary_parameters)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.replicated_parameters + self.expert_parameters + self.vocabulary_parameters > self.parameters:
            raise ValueError(
                f"replicated_parameters {self.replicated_parameters}, expert_parameters {self.expert_parameters} and "
                f"vocabulary_parameters {self.vocabulary_parameters} exceed parameters {self.parameters}"
            )
        if self.unused_parameters > self.parameters:
            raise ValueError(f"unused_parameters {self.unused_parameters} exceed parameters {self.parameters}")
        keys = [cost.key for cost in self.costs]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise ValueError(
                    f"costs[{index}] repeats the configuration (microbatch, sequence, tensor degree) {key}"
                )
        if not self.costs and not self.operators:
            raise ValueError("a layer class needs costs or operators")
        return self


class LayerRun(Part):
    """`count` equal layers in a row; `name` holds `{}` for the index when count is above 1."""

    name: Name
    layer_class: Name
    count: Count = 1
    start: Index = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.count > 1 and "{}" not in self.name:
            raise ValueError(f"name {self.name!r} stands for {self.count} layers and needs {{}} where the index goes")
        return self

    def names(self) -> list[str]:
        """Return the names of the layers this run stands for."""
        return [self.name.replace("{}", str(self.start + index)) for index in range(self.count)]


class Edge(Part):
    """A tensor that flows from one layer to another; `output_bytes` of the source unless `bytes_per_sample` is told."""

    source: Name
    target: Name
    bytes_per_sample: Bytes | None = None


class TiedWeight(Part):
    """One parameter that several layers share; it counts once, in the first of them."""

    parameter: Name
    layers: Annotated[tuple[Name, ...], Field(min_length=2)]
    num_parameters: Index


class Pedigree(Part):
    """Where, when and how the numbers were taken.

    `probe_s` is what a fixed piece of work takes on the processor at the speed of all seconds of the profile; 0 where none
    was measured. A run makes the same, and tells by it a machine that has become slower from a prediction that is wrong.
    """

    device: str = ""
    num_busy_ranks: Count = 1
    threads_per_rank: Count = 1
    versions: dict[str, str] = {}
    driver: str = ""
    clock_hz: dict[str, float] = {}
    cache_policy: Literal["hot", "flushed", "none"] = "none"
    compiled: bool = False
    taken_at: str = ""
    duration_s: Seconds = 0.0
    probe_s: Seconds = 0.0
    warnings: tuple[str, ...] = ()


class ModelProfile(Document):
    """The layers of one model with their costs.

    `action_overhead_s` is spent at each forward and each backward of a stage beside its layers, `step_overhead_s` once a
    step. `entrance_s` is the part of one forward's and one backward's overheads that a stage which begins with the
    model's first layer is spared: finding the way to the first layer it holds. `copy_bytes_per_s` is how fast parameters are
    copied, tensor by tensor; None where nobody looked, and the device's memory bandwidth tells. All seconds are medians; `jitter` says how
    single ones differ from them, None where nobody looked.
    """

    document_name: ClassVar[str] = "profile"

    name: Name
    dtype: Literal["fp64", "fp32", "bf16", "fp16", "fp8"] = "fp32"
    layers: Annotated[tuple[LayerRun, ...], Field(min_length=1, max_length=4096)]
    classes: dict[Name, LayerClass]
    edges: tuple[Edge, ...] | None = None
    tied: tuple[TiedWeight, ...] = ()
    architecture: Architecture | None = None
    framework_bytes: Bytes = 0.0
    framework_bytes_source: Source = Source.ANALYTIC
    step_overhead_s: Seconds = 0.0
    action_overhead_s: Seconds = 0.0
    entrance_s: Seconds = 0.0
    copy_bytes_per_s: Rate | None = None
    jitter: Jitter | None = None
    pedigree: Pedigree = Pedigree()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for index, run in enumerate(self.layers):
            if run.layer_class not in self.classes:
                known = ", ".join(sorted(self.classes))
                raise ValueError(f"layers[{index}].layer_class {run.layer_class!r} is not in classes ({known})")
        total = sum(run.count for run in self.layers)
        if total > MOST_LAYERS:
            raise ValueError(f"layers: the runs stand for {total} layers, a profile holds {MOST_LAYERS} at most")
        names = self.layer_names
        if len(set(names)) != len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise ValueError(f"layers: the name {twice!r} stands for two layers")
        known_names = set(names)
        for index, edge in enumerate(self.edges or ()):
            for end in (edge.source, edge.target):
                if end not in known_names:
                    raise ValueError(f"edges[{index}] names {end!r}, which is no layer")
        for index, tie in enumerate(self.tied):
            for layer in tie.layers:
                if layer not in known_names:
                    raise ValueError(f"tied[{index}] names {layer!r}, which is no layer")
        self._check_acyclic()
        return self

    def _check_acyclic(self) -> None:
        if self.edges is None:
            return
        graph: dict[str, set[str]] = {}
        for edge in self.edges:
            graph.setdefault(edge.target, set()).add(edge.source)
        try:
            tuple(TopologicalSorter(graph).static_order())
        except CycleError as error:
            raise ValueError(f"edges form a cycle: {' <- '.join(error.args[1])}") from error
        position = {name: index for index, name in enumerate(self.layer_names)}
        for index, edge in enumerate(self.edges):
            if position[edge.source] >= position[edge.target]:
                raise ValueError(
                    f"edges[{index}] goes from {edge.source!r} to {edge.target!r}, but layers stand in topological order"
                )

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """Names of all layers, repeated ones expanded."""
        return tuple(name for run in self.layers for name in run.names())

    @cached_property
    def layer_classes(self) -> tuple[str, ...]:
        """Class name of each layer, in the order of `layer_names`."""
        return tuple(run.layer_class for run in self.layers for _ in range(run.count))

    @property
    def num_layers(self) -> int:
        return len(self.layer_names)

    @cached_property
    def edge_indices(self) -> tuple[tuple[int, int], ...]:
        """Edges as pairs of layer indices; the chain when none are declared."""
        if self.edges is None:
            return tuple((index, index + 1) for index in range(self.num_layers - 1))
        position = {name: index for index, name in enumerate(self.layer_names)}
        return tuple((position[edge.source], position[edge.target]) for edge in self.edges)

    @property
    def is_chain(self) -> bool:
        return self.edge_indices == tuple((index, index + 1) for index in range(self.num_layers - 1))

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the model, tied ones counted once."""
        trained = [self.classes[name] for name in self.layer_classes if self.classes[name].is_trained]
        total = sum(layer.parameters for layer in trained)
        return total - sum(tie.num_parameters * (len(tie.layers) - 1) for tie in self.trained_ties)

    @cached_property
    def trained_ties(self) -> tuple[TiedWeight, ...]:
        """Shared parameters that are trained; frozen ones have no gradient to sum."""
        class_of = dict(zip(self.layer_names, self.layer_classes, strict=True))
        return tuple(tie for tie in self.tied if self.classes[class_of[tie.layers[0]]].is_trained)

    @cached_property
    def layer_digest(self) -> str:
        """Digest of the structure alone (names, classes, parameters, edges, ties), not of the measured numbers.

        Freezing layers does not change it: the same weights stand in the same places.
        """
        before = {name: value.frozen_from or name for name, value in self.classes.items()}
        structure = {
            "layers": [[name, before[kind]] for name, kind in zip(self.layer_names, self.layer_classes, strict=True)],
            "classes": {before[name]: [value.kind, value.parameters] for name, value in self.classes.items()},
            "edges": self.edge_indices,
            "tied": [[tie.parameter, list(tie.layers)] for tie in self.tied],
        }
        return digest_of(canonical_json(structure))
