"""A complete plan of one configuration with equal stages: what papers and hand-written launch scripts describe.

Blocks are dealt out evenly over the virtual stages, what stands before them goes to the first and what stands behind to
the last; every block recomputes alike. No search: the plan is only as good as the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator

from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.plan import Plan, Prediction, RankMapping, RecomputeRun, ScheduleSpec, StagePlan
from stagewright.planner.documents.profile import ModelProfile, Recompute, Source
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate

# A plan document needs a prediction; the scorer makes its own and does not look at this one.
_UNPRICED = Prediction(
    step_time_s=0.0,
    tokens_per_s=0.0,
    samples_per_s=0.0,
    bubble_over_total=0.0,
    peak_memory_bytes=(),
    memory=(),
    source=Source.ANALYTIC,
)


def even_plan(
    profile: ModelProfile, cluster: Cluster, job: TrainingJob, choice: Choice, *, planner: str = "even"
) -> Plan:
    """Return the plan of a configuration; its prediction is empty until it is scored.

    Raises InvalidArgument when the batch or the blocks do not divide.
    """
    degrees = choice.degrees
    share = degrees.dp * choice.microbatch
    if job.global_batch % share:
        raise InvalidArgument(
            f"global batch {job.global_batch} does not divide by dp * microbatch = {degrees.dp} * {choice.microbatch}",
            field="microbatch",
        )
    count = job.global_batch // share
    schedule = generate(choice.family, ScheduleRequest(choice.num_ranks, count, num_chunks=choice.num_chunks))
    stages = tuple(
        StagePlan(
            layers=(first, end),
            degrees=degrees,
            recompute=tuple(_levels(profile, first, end, choice.recompute)),
            group=cluster.groups[0].name,
        )
        for first, end in stage_ranges(profile, schedule.num_stages)
    )
    width = degrees.num_devices
    return Plan(
        model=profile.name,
        profile_digest=profile.digest,
        layer_digest=profile.layer_digest,
        num_layers=profile.num_layers,
        cluster=cluster,
        job=job,
        planner=planner,
        stages=stages,
        mapping=RankMapping(
            pipeline_ranks=tuple(tuple(range(rank * width, (rank + 1) * width)) for rank in range(choice.num_ranks))
        ),
        schedule=ScheduleSpec(
            name=choice.family,
            num_ranks=choice.num_ranks,
            num_microbatches=count,
            microbatch=choice.microbatch,
            num_chunks=choice.num_chunks,
            placement=tuple(tuple(row) for row in schedule.placement.tolist()),
        ),
        prediction=_UNPRICED,
    )


def block_indices(profile: ModelProfile) -> list[int]:
    """Return the layers that repeat: transformer blocks or convolutions; all layers when there are none."""
    kinds = [profile.classes[name].kind for name in profile.layer_classes]
    found = [index for index, kind in enumerate(kinds) if kind in ("block", "convolution")]
    return found or list(range(len(kinds)))


def stage_ranges(profile: ModelProfile, num_stages: int) -> Iterator[tuple[int, int]]:
    """Return (first, end) layers of each stage with equal numbers of blocks, the longer ones last."""
    blocks = block_indices(profile)
    if len(blocks) < num_stages:
        raise InvalidArgument(
            f"{len(blocks)} blocks do not fill {num_stages} stages",
            field="chunks",
            hint=f"use at most {len(blocks)} pipeline ranks times chunks",
        )
    start = 0
    for stage in range(num_stages):
        is_last = stage == num_stages - 1
        end = profile.num_layers if is_last else blocks[(stage + 1) * len(blocks) // num_stages]
        yield start, end
        start = end


def _levels(profile: ModelProfile, first: int, end: int, level: Recompute) -> Iterator[RecomputeRun]:
    repeated = set(block_indices(profile))
    for index in range(first, end):
        yield RecomputeRun(level=level if index in repeated else Recompute.NONE, count=1)
