"""What the ranks of a pool run: one function a kind of case, called on every rank with the same argument."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from delayed_recurrence import delayed_changes, elastic_changes
from runtime_documents import plan_of, profile_of
from runtime_models import LENGTH, VOCABULARY, TinyBlock, TinyBranches, TinyModel, TinySkip, hugging_face, sequential

from stagewright.modeling import split
from stagewright.modeling.autocast import with_autocast
from stagewright.modeling.batch import Batch, default_loss
from stagewright.modeling.expert_capacity import limit_experts
from stagewright.planner.cost.matrix_optimizer import MATRIX_OPTIMIZERS
from stagewright.planner.documents import Degrees, Plan, StagePlan
from stagewright.planner.link_bytes import LENT
from stagewright.planner.planned_schedule import schedule_of
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.lowering import lower
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy
from stagewright.planner.simulation.nccl import check_nccl
from stagewright.runtime.building import autocast_type
from stagewright.runtime.checkpoint import canonical_names, load_checkpoint, save_checkpoint
from stagewright.runtime.gradient_check import Comparison, compare, reference_shapes
from stagewright.runtime.groups import Groups
from stagewright.runtime.handover import continue_from, held_state
from stagewright.runtime.memory import measure_memory
from stagewright.runtime.microbatches import IGNORED, samples_of
from stagewright.runtime.optimizers import OptimizerChoice
from stagewright.runtime.reference import ReferenceRun, run_reference
from stagewright.runtime.torch_adapter import default_store
from stagewright.runtime.torch_pipelining import TorchPipeline
from stagewright.runtime.worker import Worker, WorkerSettings

CPU = torch.device("cpu")
GROUPS = Groups()


@dataclass(frozen=True)
class Case:
    """One plan to run and compare with one process."""

    schedule: str
    num_ranks: int
    num_microbatches: int
    num_chunks: int | None = None
    num_slices: int = 1
    num_waves: int | None = None
    dtype: str = "float32"
    tied: bool = True
    dropout: float = 0.1
    microbatch: int = 2
    num_steps: int = 2
    recompute: tuple[str, ...] = ()
    degrees: dict[str, int] = field(default_factory=dict)
    num_blocks: int = 0
    parameters: dict[str, str] = field(default_factory=dict)
    hugging_face: str = ""
    clip_norm: float | None = None
    num_choices: int = 0
    capacity_factor: float = 0.0
    width: int = 16
    edges: tuple[tuple[int, int], ...] = ()
    reference_microbatch: int = 0
    sequential: bool = False
    num_frozen: int = 0
    warm_up_steps: int = 0
    replicas: tuple[int, ...] = ()
    shares: tuple[tuple[int, ...], ...] = ()  # samples of a microbatch by replica of each pipeline rank
    by_stage: tuple[
        dict[str, object], ...
    ] = ()  # what stages have of their own: degrees, or fields of the plan's stage
    optimizer: str = "sgd-momentum"
    weight_decay: float = 0.0  # with it each block has a parameter that no forward uses

    @property
    def world(self) -> int:
        inner = Degrees(**self.degrees).num_devices
        replicas = self.replicas or tuple(len(row) for row in self.shares)
        return (sum(replicas) if replicas else self.num_ranks) * inner


SKIP = ((0, 1), (1, 2), (0, 2))  # edges of a skip connection over the stage in the middle


@dataclass(frozen=True)
class PreparedCase:
    """A case with its documents, made once by the test and not by each rank."""

    case: Case
    plan: Plan
    schedule: Schedule
    number: int


@dataclass(frozen=True)
class CaseResult:
    """What one rank found."""

    gradients: Comparison
    weights: Comparison
    loss: float | None
    reference_loss: float | None
    num_live: int
    sent: dict[str, float]


def make_model(case: Case, num_stages: int) -> torch.nn.Module:
    if case.hugging_face:
        return hugging_face(case.hugging_face)[0].to(getattr(torch, case.dtype))
    if case.sequential:
        return sequential(num_stages + 1).to(getattr(torch, case.dtype))
    torch.manual_seed(5)
    if case.edges:
        return (TinySkip if case.edges == SKIP else TinyBranches)().to(getattr(torch, case.dtype))
    num_blocks = case.num_blocks or max(3, num_stages - 2)
    sizes = {"dropout": case.dropout, "num_choices": case.num_choices, "width": case.width}
    model = TinyModel(num_blocks, tied=case.tied, **sizes)
    if case.weight_decay:
        for block in list(model.modules()):
            if isinstance(block, TinyBlock):
                block.unused = torch.nn.Parameter(torch.randn(7))
    if case.capacity_factor:
        limit_experts(model, case.capacity_factor)
    return model.to(getattr(torch, case.dtype))


def prepare(case: Case, number: int) -> PreparedCase:
    """Make the documents of a case; its lowered schedule passes the NCCL checker."""
    chunks = case.num_chunks or (2 * case.num_waves if case.num_waves else 2)
    chain = split(make_model(case, case.num_ranks * chunks))
    profile = profile_of(chain, sequence_length=LENGTH)
    plan = plan_of(
        chain,
        profile,
        case.schedule,
        case.num_ranks,
        case.num_microbatches,
        microbatch=case.microbatch,
        degrees=Degrees(**case.degrees),
        num_chunks=case.num_chunks,
        num_slices=case.num_slices,
        num_waves=case.num_waves,
        precision={"float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}[case.dtype],
        recompute=case.recompute,
        parameters=case.parameters,
        edges=case.edges,
        replicas=case.replicas,
        shares=case.shares,
        optimizer=case.optimizer if case.optimizer in MATRIX_OPTIMIZERS else "adamw",
    )
    if case.by_stage:
        stages = tuple(_with_own(stage, own) for stage, own in zip(plan.stages, case.by_stage, strict=True))
        plan = plan.model_copy(update={"stages": stages})
    return prepare_plan(case, plan, number)


def prepare_plan(case: Case, plan: Plan, number: int) -> PreparedCase:
    """Lower the schedule of a plan that runs with the model of a case; it passes the NCCL checker."""
    schedule = lower(
        schedule_of(plan.schedule),
        StageCosts.uniform(len(plan.stages)),
        data_parallel=True,
        zero=max(stage.degrees.zero for stage in plan.stages),
    )
    check_nccl(schedule)
    return PreparedCase(case, plan, schedule, number)


def _with_own(stage: StagePlan, own: dict[str, object]) -> StagePlan:
    """The stage with degrees and fields of its own."""
    degrees = {name: value for name, value in own.items() if name in Degrees.model_fields}
    rest = {name: value for name, value in own.items() if name not in degrees}
    return stage.model_copy(update={"degrees": stage.degrees.model_copy(update=degrees), **rest})


def batches_of(prepared: PreparedCase, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of random tokens; under dynapipe, of samples of different lengths."""
    generator = torch.Generator().manual_seed(11)
    plan = prepared.plan
    dynamic = plan.schedule.name == "dynapipe"
    size = (plan.job.global_batch if dynamic else samples_of(plan, prepared.schedule), LENGTH)
    found = [
        (
            torch.randint(VOCABULARY, size, generator=generator),
            torch.randint(VOCABULARY, size, generator=generator),
        )
        for _ in range(count)
    ]
    if dynamic:
        for _, targets in found:
            lengths = torch.randint(1, LENGTH + 1, (len(targets), 1), generator=generator)
            targets.masked_fill_(torch.arange(LENGTH) >= lengths, IGNORED)
    return found


class _Compared(NamedTuple):
    gradients: Comparison
    weights: Comparison
    loss: float | None
    reference_loss: float | None
    sent: dict[str, float]


def _compared(
    worker: Worker,
    batches: Sequence[Batch],
    optimizer: OptimizerChoice,
    reference: ReferenceRun | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> _Compared:
    """Compare a first iteration's gradients, and what steps on all batches make of the weights, with one process."""
    loss = worker.run(batches[0], 0)
    sent = worker.traffic()
    gradients = compare(worker, worker.gradients(), None if reference is None else reference.gradients, shapes)
    worker.zero_gradients()
    before = worker.weights()
    worker.use_optimizer(optimizer)
    for step, batch in enumerate(batches):
        worker.run(batch, step)
    changes = {name: value - before[name] for name, value in worker.weights().items()}
    weights = compare(worker, changes, None if reference is None else reference.changes, shapes)
    return _Compared(gradients, weights, loss, None if reference is None else reference.losses[0], sent)


def gradients_and_weights(prepared: PreparedCase) -> CaseResult:
    """Compare the gradients of one iteration, and the weights after SGD-momentum steps, with one process."""
    case, plan = prepared.case, prepared.plan
    chunks = case.num_chunks or (2 * case.num_waves if case.num_waves else 2)
    model = make_model(case, case.num_ranks * chunks)
    batches = batches_of(prepared, case.num_steps)
    if case.hugging_face:
        batches = [_in_dtype(hugging_face(case.hugging_face)[1], case.dtype)] * case.num_steps
    optimizer = OptimizerChoice(case.optimizer, 0.02 if case.optimizer in MATRIX_OPTIMIZERS else 0.5)
    if case.weight_decay:
        optimizer = replace(optimizer, weight_decay=case.weight_decay)
    warm_up = (lambda step: min(1.0, (step + 1) / case.warm_up_steps)) if case.warm_up_steps else None
    reference = None
    if dist.get_rank() == 0:
        whole = with_autocast(split(copy.deepcopy(model)), autocast_type(plan), CPU)
        reference = run_reference(
            whole,
            batches,
            microbatch=case.reference_microbatch or case.microbatch,
            seed=1,
            device=CPU,
            optimizer=optimizer,
            clip_norm=case.clip_norm,
            learning_rate_factor=warm_up,
        )
    chain = with_autocast(split(model), autocast_type(plan), CPU)
    shapes = reference_shapes(chain)
    store = dist.PrefixStore(f"case/{prepared.number}", default_store())
    worker = Worker(
        plan,
        prepared.schedule,
        chain,
        WorkerSettings(CPU, seed=1, clip_norm=case.clip_norm, learning_rate_factor=warm_up),
        store=store,
        groups=GROUPS,
    )
    compared = _compared(worker, batches, optimizer, reference, shapes)
    live = sum(stage.num_live for stage in worker.stages.values())
    worker.close()
    return CaseResult(**compared._asdict(), num_live=live)


def peak_memory(prepared: PreparedCase) -> float:
    """Return the peak memory of this rank in one step of the job's optimizer, as a run measures it.

    Every action waits until all sends have left: what is on its way then, and for how long, depends on the other ranks.
    """
    case = prepared.case
    chain = split(make_model(case, case.num_ranks * (case.num_chunks or 2)))
    store = dist.PrefixStore(f"case/{prepared.number}", default_store())
    worker = Worker(
        prepared.plan,
        prepared.schedule,
        chain,
        WorkerSettings(CPU, seed=1),
        store=store,
        groups=GROUPS,
        at_action=lambda position: worker.transport.drain(),
    )
    worker.use_optimizer(OptimizerChoice("adamw", 1e-3))
    (batch,) = batches_of(prepared, 1)
    worker.run(batch, 0)
    return measure_memory(worker, lambda: worker.run(batch, 1), CPU).peak


def bytes_lent(prepared: PreparedCase) -> tuple[float, int]:
    """Return the bytes this rank sends to its peer in one step, lent or returned, and how often it evicts."""
    case = prepared.case
    chain = split(make_model(case, case.num_ranks * 2))
    store = dist.PrefixStore(f"case/{prepared.number}", default_store())
    worker = Worker(prepared.plan, prepared.schedule, chain, WorkerSettings(CPU, seed=1), store=store, groups=GROUPS)
    (batch,) = batches_of(prepared, 1)
    worker.run(batch, 0)
    return worker.traffic().get(LENT, 0.0), sum(action.kind is Kind.EVICT for action in worker.actions)


def post_validated_and_synchronous(argument: tuple[PreparedCase, float | None, int]) -> tuple[bool, int, int]:
    """Whether weights and states after five steps are the same bits with post-validation, and how many it amended and took back.

    The loss of step `broken` is not a number.
    """
    prepared, clip_norm, broken = argument
    case = prepared.case
    chunks = case.num_chunks or 2
    batches = batches_of(prepared, 5)
    found = []
    for post_validation in (False, True):
        chain = split(make_model(case, case.num_ranks * chunks))
        settings = WorkerSettings(
            CPU, seed=1, clip_norm=clip_norm, skip_nonfinite=True, post_validation=post_validation
        )
        store = dist.PrefixStore(f"case/{prepared.number}/{post_validation}", default_store())
        worker = Worker(prepared.plan, prepared.schedule, chain, settings, store=store, groups=GROUPS)
        worker.use_optimizer(OptimizerChoice("adamw", 1e-2))
        worker.iteration = partial(_with_a_broken_loss, worker.iteration, broken)
        for step, batch in enumerate(batches):
            worker.run(batch, step)
        states = worker.optimizer_states()
        found.append(
            {**worker.weights(), **{f"{key}/{name}": v for key, row in states.items() for name, v in row.items()}}
        )
    same = all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert worker.validation is not None
    return same and len(found[0]) == len(found[1]), worker.validation.num_amended, worker.validation.num_rollbacks


def _with_a_broken_loss(iteration, broken, batch, step):
    weight = {"loss_weight": float("nan")} if step == broken else {}
    return {unit: replace(each, **weight) for unit, each in iteration(batch, step).items()}


def on_torchs_own_runtime(prepared: PreparedCase) -> float:
    """Return the largest error of the gradients here against those of the same schedule on torch's own runtime."""
    case, plan = prepared.case, prepared.plan
    (batch,) = batches_of(prepared, 1)
    model = make_model(case, case.num_ranks * (case.num_chunks or 2))
    other = copy.deepcopy(model)
    chain = split(model)
    store = dist.PrefixStore(f"case/{prepared.number}", default_store())
    worker = Worker(plan, prepared.schedule, chain, WorkerSettings(CPU, seed=1), store=store, groups=GROUPS)
    worker.run(batch, 0)
    mine = {
        stage: torch.nn.Sequential(*(other[index] for index in plan.stages[stage].layer_indices))
        for _, stage in worker.topology.stages
    }
    theirs = TorchPipeline(schedule_of(plan.schedule), mine, default_loss, CPU)
    theirs.step(*batch)
    expected = dict(other.named_parameters())
    scale = max(float(value.norm()) for value in worker.gradients().values())
    return max(
        float((value - expected[name].grad).norm()) / max(float(value.norm()), 1e-6 * scale)
        for name, value in worker.gradients().items()
    )


def delayed_weights(argument: tuple[PreparedCase, OptimizerChoice]) -> float:
    """Return the largest error of an asynchronous schedule's weights against the recurrence in one process."""
    prepared, optimizer = argument
    case, plan, schedule = prepared.case, prepared.plan, prepared.schedule
    chunks = case.num_chunks or 2
    model = make_model(case, case.num_ranks * chunks)
    batches = batches_of(prepared, case.num_steps)
    expected = None
    if dist.get_rank() == 0 and schedule.weight_policy is WeightPolicy.ELASTIC:
        expected = elastic_changes(schedule, copy.deepcopy(model), batches, optimizer, case.microbatch)
    elif dist.get_rank() == 0:
        expected = delayed_changes(plan, schedule, copy.deepcopy(model), batches, optimizer, case.microbatch)
    chain = split(model)
    shapes = reference_shapes(chain)
    store = dist.PrefixStore(f"case/{prepared.number}", default_store())
    worker = Worker(plan, schedule, chain, WorkerSettings(CPU, seed=1), store=store, groups=GROUPS)
    before = worker.weights()
    worker.use_optimizer(optimizer)
    for step, batch in enumerate(batches):
        worker.run(batch, step)
    changes = {name: value - before[name] for name, value in worker.weights().items()}
    return compare(worker, changes, expected, shapes).max_relative_error


def _in_dtype(batch: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    wanted = getattr(torch, dtype)
    return {name: value.to(wanted) if value.is_floating_point() else value for name, value in batch.items()}


def continue_under_another_plan(argument: tuple[PreparedCase, PreparedCase, str]) -> float:
    """Train under one plan, save, load under the other, go on; the largest error against one uninterrupted process."""
    first, second, directory = argument
    case = first.case
    chunks = case.num_chunks or 2
    batches = batches_of(first, 4)
    optimizer = OptimizerChoice("adamw", 1e-2)
    original = make_model(case, case.num_ranks * chunks)
    expected = None
    if dist.get_rank() == 0:
        whole = split(copy.deepcopy(original))
        expected = run_reference(
            whole, batches, microbatch=case.microbatch, seed=1, device=CPU, optimizer=optimizer
        ).changes
    start = {name: value.detach().clone() for name, value in original.named_parameters()}
    shapes: dict[str, tuple[int, ...]] = {}
    for prepared, steps in ((first, (0, 1)), (second, (2, 3))):
        chain = split(copy.deepcopy(original))
        shapes = reference_shapes(chain)
        store = dist.PrefixStore(f"case/{prepared.number}", default_store())
        worker = Worker(
            prepared.plan, prepared.schedule, chain, WorkerSettings(CPU, seed=1), store=store, groups=GROUPS
        )
        worker.use_optimizer(optimizer)
        if steps[0]:
            with torch.no_grad():
                worker.load_weights({name: torch.zeros_like(value) for name, value in worker.weights().items()})
            assert load_checkpoint(worker, directory) == 2
        for step in steps:
            worker.run(batches[step], step)
        if not steps[0]:
            save_checkpoint(worker, directory, step=2)
    names = {name: tie.parameter for tie in worker.chain.ties for name in tie.names}
    changes = {name: value - start[names.get(name, name)] for name, value in worker.weights().items()}
    return compare(worker, changes, expected, shapes).max_relative_error


def live_move(argument: tuple[PreparedCase, PreparedCase]) -> tuple[float, float]:
    """Train under one plan, go on under the other from what the ranks hold; the largest error, and bytes received."""
    first, second = argument
    case = first.case
    batches = batches_of(first, 4)
    optimizer = OptimizerChoice("adamw", 1e-2)
    original = make_model(case, 0)
    expected = None
    if dist.get_rank() == 0:
        whole = split(copy.deepcopy(original))
        expected = run_reference(
            whole, batches, microbatch=case.microbatch, seed=1, device=CPU, optimizer=optimizer
        ).changes
    start = {name: value.detach().clone() for name, value in original.named_parameters()}
    workers = []
    received = 0.0
    for prepared, steps in ((first, (0, 1)), (second, (2, 3))):
        chain = split(copy.deepcopy(original))
        shapes = reference_shapes(chain)
        store = dist.PrefixStore(f"case/{prepared.number}", default_store())
        worker = Worker(
            prepared.plan, prepared.schedule, chain, WorkerSettings(CPU, seed=1), store=store, groups=GROUPS
        )
        worker.use_optimizer(optimizer)
        if workers:
            received = continue_from(worker, held_state(workers[-1]))
        workers.append(worker)
        for step in steps:
            worker.run(batches[step], step)
    names = canonical_names(worker)
    changes = {name: value - start[names[name]] for name, value in worker.weights().items()}
    return compare(worker, changes, expected, shapes).max_relative_error, received


def switched_groups(argument: tuple[PreparedCase, PreparedCase]) -> tuple[float, tuple[int, ...]]:
    """Run two batches one after the other, each with its own plan's groups, and compare the sum of their gradients.

    Returns the largest relative error against one process, and the context-parallel ranks of this one in each plan.
    """
    model = make_model(argument[0].case, 2)
    total: dict[str, torch.Tensor] = {}
    other = split(copy.deepcopy(model))
    tokens, groups = 0, []
    for prepared in argument:
        batch = _tokens(prepared)
        chain = split(copy.deepcopy(model))
        store = dist.PrefixStore(f"case/{prepared.number}", default_store())
        worker = Worker(
            prepared.plan, prepared.schedule, chain, WorkerSettings(CPU, seed=1), store=store, groups=GROUPS
        )
        worker.run(batch, 0)
        count = batch[0].numel()
        for name, value in worker.gradients().items():
            total[name] = total.get(name, torch.zeros_like(value)) + count * value
        (loss,) = other.segment(0, other.num_layers).run(batch, seed=0)
        (count * loss).backward()
        groups.append(worker.topology.context_ranks)
        tokens += count
        worker.close()
    expected = dict(other.model.named_parameters())
    scale = max(float(value.norm()) for value in total.values())
    errors = [
        float((value - expected[name].grad).norm()) / max(float(value.norm()), 1e-6 * scale)
        for name, value in total.items()
    ]
    return max(errors), tuple(len(group) for group in groups)


def _tokens(prepared: PreparedCase) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(prepared.plan.job.sequence_length)
    size = (samples_of(prepared.plan, prepared.schedule), prepared.plan.job.sequence_length)
    return tuple(torch.randint(VOCABULARY, size, generator=generator) for _ in range(2))
