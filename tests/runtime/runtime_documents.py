"""Profiles of real models with mocked numbers, and plans of given sizes: what run tests are made of."""

from __future__ import annotations

from itertools import accumulate, pairwise

from stagewright.modeling import LayerChain
from stagewright.planner.documents import (
    ConfigurationCost,
    Degrees,
    Edge,
    LayerClass,
    LayerRun,
    MemoryItems,
    ModelProfile,
    Optimizer,
    Plan,
    Prediction,
    RankMapping,
    Recompute,
    ScheduleSpec,
    Source,
    StagePlan,
    TiedWeight,
    TrainingJob,
)
from stagewright.planner.documents.document import Document
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.testing.mocked_cluster import cluster_factory


def profile_of(
    chain: LayerChain,
    *,
    microbatches: tuple[int, ...] = (1, 2, 4),
    sequence_length: int = 8,
    output_bytes: float = 256.0,
    tensor_degrees: tuple[int, ...] = (1,),
) -> ModelProfile:
    """A profile of the chain's layers, a millisecond each; `output_bytes` for one sample."""
    classes = {}
    for layer in chain.layers:
        classes[layer.layer_class] = LayerClass(
            kind=layer.kind,
            parameters=layer.num_parameters,
            costs=tuple(
                ConfigurationCost(
                    microbatch=size,
                    sequence_length=sequence_length,
                    tensor_degree=degree,
                    forward_s=1e-3,
                    input_grad_s=1e-3,
                    weight_grad_s=1e-3,
                    activation_bytes=dict.fromkeys(Recompute, 1000.0 * size),
                    output_bytes=output_bytes * size,
                    source=Source.MOCKED,
                )
                for degree in tensor_degrees
                for size in microbatches
            ),
        )
    return ModelProfile(
        name="tiny",
        layers=tuple(LayerRun(name=layer.name, layer_class=layer.layer_class) for layer in chain.layers),
        classes=classes,
        edges=None
        if chain.named_edges is None
        else tuple(Edge(source=source, target=target) for source, target in chain.named_edges),
        tied=tuple(
            TiedWeight(parameter=tie.parameter, layers=tie.layers, num_parameters=tie.num_parameters)
            for tie in chain.ties
        ),
    )


def plan_of(
    chain: LayerChain,
    profile: ModelProfile,
    schedule: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    microbatch: int = 2,
    sequence_length: int = 8,
    degrees: Degrees | None = None,
    num_chunks: int | None = None,
    num_slices: int = 1,
    num_waves: int | None = None,
    precision: str = "fp32",
    optimizer: str = "adamw",
    recompute: tuple[object, ...] = (),
    cluster: Document | None = None,
    parameters: dict[str, int | float | str] | None = None,
    edges: tuple[tuple[int, int], ...] = (),
    replicas: tuple[int, ...] = (),
    shares: tuple[tuple[int, ...], ...] = (),
) -> Plan:
    """Layers spread evenly over the stages, pipeline ranks of neighbouring global ranks, maybe with `replicas` of their own.

    `shares` are samples of a microbatch by replica of each pipeline rank.
    """
    replicas = replicas or tuple(len(row) for row in shares)
    degrees = degrees or Degrees()
    each = [degrees.model_copy(update={"dp": count}) for count in replicas] or [degrees] * num_ranks
    made = generate(
        schedule,
        ScheduleRequest(
            num_ranks,
            num_microbatches,
            num_chunks=num_chunks,
            num_slices=num_slices,
            num_waves=num_waves,
            edges=edges,
            parameters=parameters or {},
        ),
    )
    ends = [0, *accumulate(one.num_devices for one in each)]
    bounds = [index * chain.num_layers // made.num_stages for index in range(made.num_stages + 1)]
    device = cluster or cluster_factory(devices_per_node=ends[-1])
    if cluster is None:
        group = device.groups[0]
        cpu = group.device.model_copy(update={"kind": "cpu", "host_bytes_per_s": 10e9})
        device = device.model_copy(update={"groups": (group.model_copy(update={"device": cpu}),)})
    return Plan(
        model="tiny",
        profile_digest=profile.digest,
        layer_digest=profile.layer_digest,
        num_layers=chain.num_layers,
        cluster=device,
        job=TrainingJob(
            global_batch=num_microbatches * (sum(shares[0]) if shares else microbatch * each[0].dp),
            sequence_length=sequence_length,
            precision=precision,
            optimizer=Optimizer.standard(optimizer, precision),
        ),
        planner="test",
        stages=tuple(
            StagePlan(
                layers=(first, end),
                degrees=each[rank],
                recompute=_runs(recompute, end - first),
                batch_shares=shares[rank] if shares else (),
            )
            for (first, end), rank in zip(pairwise(bounds), made.placement[0].tolist(), strict=True)
        ),
        mapping=RankMapping(pipeline_ranks=tuple(tuple(range(first, end)) for first, end in pairwise(ends))),
        schedule=ScheduleSpec(
            name=schedule,
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            microbatch=max(shares[0]) if shares else microbatch,
            num_chunks=num_chunks or made.num_chunks // made.num_replicas,
            num_slices=num_slices,
            num_waves=num_waves,
            placement=tuple(tuple(row) for row in made.placement.tolist()),
            parameters=parameters or {},
            edges=edges,
        ),
        prediction=Prediction(
            step_time_s=1.0,
            tokens_per_s=0.0,
            samples_per_s=0.0,
            bubble_over_total=0.0,
            peak_memory_bytes=(0.0,) * num_ranks,
            memory=(MemoryItems(),) * num_ranks,
            source=Source.MOCKED,
        ),
    )


def _runs(levels: tuple[object, ...], count: int) -> tuple[object, ...]:
    from stagewright.planner.documents import RecomputeRun

    return tuple(RecomputeRun(level=levels[index % len(levels)], count=1) for index in range(count)) if levels else ()
