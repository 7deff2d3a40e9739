"""What the ranks of a pool run: one function a kind of case, called on every rank with the same argument."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from tiny_lowering import lower
from torch import nn
from torch.nn import functional

from stagewright.modeling import split
from stagewright.planner.documents import (
    Degrees,
    MemoryItems,
    Plan,
    Prediction,
    RankMapping,
    ScheduleSpec,
    Source,
    StagePlan,
    TrainingJob,
)
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import Schedule
from stagewright.runtime.gradient_check import compare, reference_shapes
from stagewright.runtime.optimizers import OptimizerChoice
from stagewright.runtime.reference import run_reference
from stagewright.runtime.worker import Worker, WorkerSettings
from stagewright.testing.mocked_cluster import cluster_factory

VOCABULARY, LENGTH = 37, 8


class TinyBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden):
        batch, length, width = hidden.shape
        parts = self.attention(self.norm(hidden)).view(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        hidden = hidden + self.dropout(self.output(mixed.transpose(1, 2).reshape(batch, length, width)))
        return hidden + self.dropout(self.outer(functional.gelu(self.inner(hidden))))


class TinyModel(nn.Module):
    def __init__(self, num_blocks: int, *, tied: bool, dropout: float, width: int = 16) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList([TinyBlock(width, dropout) for _ in range(num_blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens, targets):
        hidden = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden)
        return functional.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Case:
    """One plan to run and compare with one process."""

    schedule: str
    num_ranks: int
    num_microbatches: int
    num_chunks: int | None = None
    num_slices: int = 1
    num_waves: int | None = None
    dp: int = 1
    dtype: str = "float32"
    tied: bool = True
    dropout: float = 0.1
    microbatch: int = 2
    num_steps: int = 3
    placement: tuple[tuple[int, ...], ...] | None = None
    degrees: dict[str, int] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return self.num_ranks * self.dp


def schedule_of(case: Case) -> Schedule:
    return generate(
        case.schedule,
        ScheduleRequest(
            case.num_ranks,
            case.num_microbatches,
            num_chunks=case.num_chunks,
            num_slices=case.num_slices,
            num_waves=case.num_waves,
        ),
    )


def plan_of(case: Case, schedule: Schedule, chain) -> Plan:
    """Layers spread evenly over the stages; pipeline ranks of dp neighbouring global ranks."""
    count, stages = chain.num_layers, schedule.num_stages
    bounds = [index * count // stages for index in range(stages + 1)]
    degrees = Degrees(dp=case.dp, **case.degrees)
    size = degrees.num_devices
    cluster = cluster_factory(devices_per_node=case.num_ranks * size)
    return Plan(
        model="tiny",
        profile_digest="none",
        layer_digest=chain.layer_digest,
        num_layers=count,
        cluster=cluster,
        job=TrainingJob(
            global_batch=case.num_microbatches * case.microbatch * case.dp, sequence_length=LENGTH, precision="fp32"
        ),
        planner="test",
        stages=tuple(StagePlan(layers=(first, end), degrees=degrees) for first, end in itertools.pairwise(bounds)),
        mapping=RankMapping(
            pipeline_ranks=tuple(tuple(range(rank * size, (rank + 1) * size)) for rank in range(case.num_ranks))
        ),
        schedule=ScheduleSpec(
            name=case.schedule,
            num_ranks=case.num_ranks,
            num_microbatches=case.num_microbatches,
            microbatch=case.microbatch,
            num_chunks=schedule.num_chunks,
            num_slices=schedule.num_slices,
            placement=tuple(tuple(row) for row in schedule.placement.tolist()),
            edges=schedule.edges,
        ),
        prediction=Prediction(
            step_time_s=1.0,
            tokens_per_s=0.0,
            samples_per_s=0.0,
            bubble_over_total=0.0,
            peak_memory_bytes=(0.0,) * case.num_ranks,
            memory=(MemoryItems(),) * case.num_ranks,
            source=Source.MOCKED,
        ),
    )


def batches_of(case: Case, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    size = (case.num_microbatches * case.microbatch * case.dp, LENGTH)
    return [
        (
            torch.randint(VOCABULARY, size, generator=generator),
            torch.randint(VOCABULARY, size, generator=generator),
        )
        for _ in range(count)
    ]


def gradients_and_weights(case: Case) -> dict[str, object]:
    """Return the largest errors of gradients and of weights after SGD-momentum steps, and what stayed behind."""
    schedule = schedule_of(case)
    torch.manual_seed(5)
    dtype = getattr(torch, case.dtype)
    num_blocks = max(3, schedule.num_stages - 2)
    model = TinyModel(num_blocks, tied=case.tied, dropout=case.dropout).to(dtype)
    batches = batches_of(case, case.num_steps)
    optimizer = OptimizerChoice("sgd-momentum", 0.1)
    reference = None
    if dist.get_rank() == 0:
        reference = run_reference(
            split(copy.deepcopy(model)),
            batches,
            microbatch=case.microbatch,
            seed=1,
            device=torch.device("cpu"),
            optimizer=optimizer,
        )
    chain = split(model)
    shapes = reference_shapes(chain)
    store = dist.PrefixStore(f"case/{_case_number()}", dist.distributed_c10d._get_default_store())
    worker = Worker(
        plan_of(case, schedule, chain),
        lower(schedule),
        chain,
        WorkerSettings(torch.device("cpu"), seed=1),
        store=store,
    )
    loss = worker.run(batches[0], 0)
    gradients = {name: value.grad for name, value in worker.parameters().items() if value.requires_grad}
    found = compare(worker, gradients, None if reference is None else reference.gradients, shapes)
    worker.zero_gradients()
    before = {name: value.detach().clone() for name, value in worker.parameters().items()}
    worker.use_optimizer(optimizer)
    for step, batch in enumerate(batches):
        worker.run(batch, step)
    changes = {name: value.detach() - before[name] for name, value in worker.parameters().items()}
    weights = compare(worker, changes, None if reference is None else reference.changes, shapes)
    live = sum(stage.num_live for stage in worker.stages.values())
    worker.close()
    return {
        "gradients": replace(found),
        "weights": weights,
        "loss": loss,
        "reference_loss": None if reference is None else reference.losses[0],
        "live": live,
    }


_counter = iter(range(10**9))


def _case_number() -> int:
    return next(_counter)
