"""What the ranks of a pool run to look into the parallel degrees: buckets, states, traffic."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from runtime_cases import CPU, GROUPS, PreparedCase, batches_of, make_model
from runtime_models import hugging_face
from torch import Tensor

from stagewright.modeling import split
from stagewright.modeling.expert_capacity import Capacity, capacity_of
from stagewright.modeling.tensor_collectives import TensorGroup
from stagewright.planner.cost.matrix_optimizer import MATRIX_OPTIMIZERS
from stagewright.runtime.gradient_check import compare, reference_shapes
from stagewright.runtime.memory import RankMemory, state_memory
from stagewright.runtime.optimizers import OptimizerChoice, make_optimizer
from stagewright.runtime.reduction import ReplicatedBucket
from stagewright.runtime.ring import ring_all_reduce
from stagewright.runtime.sharding import ShardedBucket
from stagewright.runtime.torch_adapter import cpu_allocation_changes, default_store
from stagewright.runtime.worker import Worker, WorkerSettings


@dataclass(frozen=True)
class BucketCounts:
    """Bytes of gradients on one rank, in how many buckets, and how many of them started inside the last backward."""

    gradient_bytes: int
    num_buckets: int
    num_overlapped: int


def make_worker(prepared: PreparedCase) -> Worker:
    case = prepared.case
    chunks = case.num_chunks or (2 * case.num_waves if case.num_waves else 2)
    chain = split(make_model(case, case.num_ranks * chunks))
    store = dist.PrefixStore(f"case/{prepared.number}", default_store())
    return Worker(prepared.plan, prepared.schedule, chain, WorkerSettings(CPU, seed=1), store=store, groups=GROUPS)


def buckets_of_an_iteration(prepared: PreparedCase) -> BucketCounts:
    worker = make_worker(prepared)
    worker.run(batches_of(prepared, 1)[0], 0)
    buckets = [bucket for bucket in worker.buckets.buckets if isinstance(bucket, ReplicatedBucket)]
    size = sum(value.numel() * value.element_size() for bucket in buckets for value in bucket.optimized())
    return BucketCounts(
        size, sum(bucket.num_buckets for bucket in buckets), sum(bucket.num_overlapped for bucket in buckets)
    )


def ring(length: int) -> tuple[int, float]:
    """Return the bytes this rank sent to sum `length` numbers over all ranks, and the largest error of the sum."""
    group = GROUPS.make("ring", range(dist.get_world_size()))
    assert group is not None
    value = torch.arange(length, dtype=torch.float64) * (dist.get_rank() + 1)
    expected = value.clone()
    dist.all_reduce(expected, group=group)
    sent = ring_all_reduce(value, group)
    return sent, float((value - expected).abs().max())


def sent_in_a_step(prepared: PreparedCase, *, equal_choices: bool = False) -> dict[str, float]:
    """Return the bytes this rank sends in one iteration with its optimizer step; maybe every token chooses the same experts."""
    worker = make_worker(prepared)
    if equal_choices:
        weights = worker.weights()
        worker.load_weights(weights | {name: 0 * weights[name] for name in weights if name.endswith("gate.weight")})
    worker.use_optimizer(OptimizerChoice(prepared.plan.job.optimizer.name, 1e-3))
    name = prepared.case.hugging_face
    worker.run(hugging_face(name)[1] if name else batches_of(prepared, 1)[0], 0)
    return worker.traffic()


def sent_in_the_second_step(prepared: PreparedCase) -> dict[str, float]:
    """Return the bytes this rank sends in an iteration that finds optimizer states in their places."""
    worker = make_worker(prepared)
    worker.use_optimizer(OptimizerChoice(prepared.plan.job.optimizer.name, 1e-3))
    (batch,) = batches_of(prepared, 1)
    worker.run(batch, 0)
    before = worker.traffic()
    worker.run(batch, 1)
    return {name: value - before.get(name, 0.0) for name, value in worker.traffic().items()}


def sent_with_equal_choices(prepared: PreparedCase) -> dict[str, float]:
    return sent_in_a_step(prepared, equal_choices=True)


@dataclass(frozen=True)
class TrainedState:
    """What a rank holds after some steps, and how far its weights are from another plan's."""

    memory: RankMemory
    unit_bytes: list[float]
    peak_parameter_bytes: float
    max_relative_error: float


def train_and_compare(argument: tuple[PreparedCase, PreparedCase, int]) -> TrainedState:
    """Train under two plans; the error of the second one's weights against the first's, and the second one's states."""
    first, second, num_steps = argument
    changes, shapes = [], {}
    for prepared in (first, second):
        shapes = reference_shapes(split(make_model(prepared.case, prepared.case.num_ranks * 2)))
        worker = make_worker(prepared)
        worker.use_optimizer(OptimizerChoice("adamw", 1e-2))
        before = worker.weights()
        for step, batch in enumerate(batches_of(prepared, num_steps)):
            worker.run(batch, step)
        changes.append({name: value - before[name] for name, value in worker.weights().items()})
    found = compare(worker, changes[1], changes[0] if dist.get_rank() == 0 else None, shapes)
    sharded = [bucket for bucket in worker.buckets.buckets if isinstance(bucket, ShardedBucket)]
    shards = sum(value.numel() * value.element_size() for bucket in sharded for value in bucket.optimized())
    window = max((window.peak_bytes for window in worker.windows.values()), default=0)
    return TrainedState(
        state_memory(worker), [float(bucket.num_bytes) for bucket in sharded], shards + window, found.max_relative_error
    )


def held_states(prepared: PreparedCase) -> RankMemory:
    """Return what this rank holds after a step of the job's optimizer."""
    worker = make_worker(prepared)
    worker.use_optimizer(OptimizerChoice(prepared.plan.job.optimizer.name, 1e-2))
    name = prepared.case.hugging_face
    worker.run(hugging_face(name)[1] if name else batches_of(prepared, 1)[0], 0)
    return state_memory(worker)


def trained_state(prepared: PreparedCase) -> tuple[str, RankMemory]:
    """Return a digest of this rank's weights after three AdamW steps, and what it holds then."""
    worker = make_worker(prepared)
    worker.use_optimizer(OptimizerChoice("adamw", 1e-2))
    for step, batch in enumerate(batches_of(prepared, 3)):
        worker.run(batch, step)
    digest = hashlib.sha256()
    for _, value in sorted(worker.weights().items()):
        digest.update(value.float().numpy().tobytes())
    return digest.hexdigest(), state_memory(worker)


def stepped_types(prepared: PreparedCase) -> tuple[set[str], float]:
    """Return the types of what this rank's optimizers step on, and how far the bucket moves that moves least.

    Steps are so small that bf16 weights would never move.
    """
    worker = make_worker(prepared)
    name = prepared.case.optimizer
    worker.use_optimizer(OptimizerChoice(name if name in MATRIX_OPTIMIZERS else "sgd", 1e-6))
    before = [value.detach().clone() for bucket in worker.buckets.buckets for value in bucket.optimized()]
    worker.run(batches_of(prepared, 1)[0], 0)
    after = [value.detach() for bucket in worker.buckets.buckets for value in bucket.optimized()]
    moved = [float((new - old).abs().max()) for old, new in zip(before, after, strict=True)]
    return {str(value.dtype) for value in after}, min(moved)


def dropped_choices(prepared: PreparedCase) -> tuple[int, int]:
    """Return how many choices of experts this rank has dropped, and how many exceed the capacity on its microbatches."""
    case, plan = prepared.case, prepared.plan
    model = make_model(case, case.num_ranks * 2)
    limits = [module.forward for module in model.modules() if isinstance(module.__dict__.get("forward"), Capacity)]
    store = dist.PrefixStore(f"case/{prepared.number}", default_store())
    worker = Worker(plan, prepared.schedule, split(model), WorkerSettings(CPU, seed=1), store=store, groups=GROUPS)
    seen: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args, limit=limit: seen.append(_excess(args[1], limit)))
        for module, limit in zip([m for m in model.modules() if hasattr(m, "inner")], limits, strict=True)
    ]
    worker.run(batches_of(prepared, 1)[0], 0)
    for hook in hooks:
        hook.remove()
    return sum(limit.num_dropped for limit in limits), sum(seen)


def _excess(index: torch.Tensor, limit: Capacity) -> int:
    capacity = capacity_of(index.shape[0], index.shape[1], limit.num_experts, limit.factor)
    load = torch.bincount(index.reshape(-1), minlength=limit.num_experts)
    return int((load - capacity).clamp(min=0).sum())


def local_steps(prepared: PreparedCase) -> tuple[float, float]:
    """Return the largest error of the weights against the recurrence in one process, and the bytes sent to other replicas."""
    case, plan = prepared.case, prepared.plan
    inner = OptimizerChoice("adamw", 1e-2)
    batches = batches_of(prepared, case.num_steps)
    model = make_model(case, case.num_ranks * 2)
    shapes = reference_shapes(split(copy.deepcopy(model)))
    expected = _local_recurrence(prepared, copy.deepcopy(model), batches, inner) if dist.get_rank() == 0 else None
    worker = make_worker(prepared)
    before = worker.weights()
    worker.use_optimizer(inner)
    for step, batch in enumerate(batches):
        worker.run(batch, step)
    changes = {name: value - before[name] for name, value in worker.weights().items()}
    sent = {name: value for name, value in worker.traffic().items() if "pp" not in name and value}
    assert set(sent) == {"all-reduce/outer"} or plan.stages[0].degrees.zero, sent
    return compare(worker, changes, expected, shapes).max_relative_error, sent["all-reduce/outer"]


def _local_recurrence(prepared, model, batches, inner) -> dict[str, torch.Tensor]:
    """DiLoCo written down: a copy of the model a replica, and the outer step on what they share."""
    plan, told = prepared.plan, prepared.plan.schedule.parameters
    replicas, count, size = plan.stages[0].degrees.dp, plan.schedule.num_microbatches, plan.schedule.microbatch
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    models = [copy.deepcopy(model) for _ in range(replicas)]
    steppers = [make_optimizer(inner, each.parameters()) for each in models]
    anchor = {name: value.clone() for name, value in start.items()}
    velocity = {name: torch.zeros_like(value) for name, value in start.items()}
    rate, momentum = 0.7, 0.9
    for step, batch in enumerate(batches):
        for replica, (each, stepper) in enumerate(zip(models, steppers, strict=True)):
            stepper.zero_grad()
            for index in range(count):
                first = (replica * count + index) * size
                tokens, targets = (value[first : first + size] for value in batch)
                (each(tokens, targets) / count).backward()
            stepper.step()
        if (step + 1) % int(told["local_steps"]) == 0:
            held = [dict(each.named_parameters()) for each in models]
            for name in anchor:
                change = sum(anchor[name] - each[name].detach() for each in held) / replicas
                velocity[name] = momentum * velocity[name] + change
                anchor[name] = anchor[name] - rate * (change + momentum * velocity[name])
                for each in held:
                    each[name].data.copy_(anchor[name])
    return {name: anchor[name] - start[name] for name in start}


def bytes_left_by_collectives(rounds: int) -> dict[str, int]:
    """Return by collective what is counted as held after tensors that nobody keeps went through it `rounds` times."""
    group = TensorGroup(dist.new_group(range(dist.get_world_size())))
    value = torch.ones(1, 1 << 8, 16)

    def scatter_and_wait(value: Tensor) -> Tensor:
        flat = value.reshape(-1).clone()
        mine = flat.new_empty(flat.numel() // dist.get_world_size())
        work = dist.reduce_scatter_tensor(mine, flat, group=group.group, async_op=True)
        work.wait()
        return mine

    def sum_and_wait(value: Tensor) -> Tensor:
        flat = value.clone()
        dist.all_reduce(flat, group=group.group, async_op=True).wait()
        return flat

    def repeat(collective: Callable[[Tensor], Tensor]) -> None:
        for _ in range(rounds):
            collective(value)

    collectives = (group.all_reduce, group.all_gather, group.reduce_scatter, scatter_and_wait, sum_and_wait)
    return {each.__name__: sum(cpu_allocation_changes(partial(repeat, each))) for each in collectives}


def peak_beside_a_gather(pause_s: float) -> int:
    """Return the most bytes counted where a tensor of 3,000 comes and goes while two ranks gather one of 8,000 between them."""
    group = dist.new_group(range(dist.get_world_size()))
    flat, shard = torch.empty(2000), torch.ones(1000)

    def gather() -> None:
        work = dist.all_gather_into_tensor(flat, shard, group=group, async_op=True)
        time.sleep(pause_s)
        beside = torch.empty(750)
        del beside
        work.wait()

    changes = cpu_allocation_changes(gather)
    assert sum(changes) == 0
    return max(accumulate(changes))
