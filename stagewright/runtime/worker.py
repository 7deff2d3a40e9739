"""One rank's part of a plan: its stages, their parameters, and one iteration after another.

A worker assembles the collaborators (stages, mailbox, reducer, optimizers, interpreter) from plan, lowered schedule and
layer chain, in a process group that exists. It drops the parameters of the layers it does not hold.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.modeling.batch import Batch, batch_size, select_samples, slice_batch, to_device
from stagewright.modeling.block_matrices import block_matrices
from stagewright.modeling.chain import LayerChain
from stagewright.modeling.seeding import microbatch_seed
from stagewright.modeling.slicing import divide_sequence, equal_lengths, select_sequence, sequence_length
from stagewright.modeling.tensor_parallel import TensorShards
from stagewright.planner.cost.matrix_optimizer import MATRIX_OPTIMIZERS
from stagewright.planner.cost.memory_actions import offloaded_elements
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.link_bytes import HOST_COPY
from stagewright.planner.replica_shares import has_uneven_shares, samples_by_replica
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy
from stagewright.runtime.batch_shares import replica_part, replica_weight
from stagewright.runtime.bucket_maker import BucketMaker
from stagewright.runtime.communication import Message, PointToPoint, ShapeBook
from stagewright.runtime.groups import Groups
from stagewright.runtime.interpreter import Interpreter, Iteration, UnitInput, WarmUp, warm_up_length
from stagewright.runtime.local_steps import LocalSteps, outer_step_of
from stagewright.runtime.mailbox import Mailbox
from stagewright.runtime.matrix_layout import (
    Layout,
    LayoutOf,
    RowsLayout,
    SplitLayout,
    TensorKinds,
    vocabulary_parameters,
    whole_layouts,
)
from stagewright.runtime.microbatches import division_of, plan_iteration, samples_over_replicas
from stagewright.runtime.offload import last_elements
from stagewright.runtime.optimizers import OptimizerChoice, make_optimizer, scale_learning_rate
from stagewright.runtime.peer_swap import make_swap, traffic_of
from stagewright.runtime.piecewise_optimizer import PiecewiseOptimizer, has_narrow_gradients
from stagewright.runtime.post_validation import PostValidation
from stagewright.runtime.rank_layers import RankLayers
from stagewright.runtime.recorder import Recorder, now_s
from stagewright.runtime.reduction import Bucket, BucketSet
from stagewright.runtime.resharding import make_reshardings
from stagewright.runtime.sharding import ShardedBucket
from stagewright.runtime.stage import Unit
from stagewright.runtime.stage_graph import StageGraph, make_stage_graph
from stagewright.runtime.step_rule import StepRule, scale_gradients, whole_squared_norm
from stagewright.runtime.topology import StageKey, Topology
from stagewright.runtime.weight_versions import VersionedBucket


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is told beside the plan.

    Parameters
    ----------
    device : where this rank computes.
    seed : of random numbers in the layers.
    clip_norm : largest 2-norm of the gradient of the whole model; None does not clip.
    skip_nonfinite : take no step when a gradient of the model is not finite.
    post_validation : step before the norm of the whole model is known, and amend later (`post_validation`).
    learning_rate_factor : what the optimizer's learning rate is multiplied with in a step, given its number from 0.
    clock : what spans are recorded with.
    """

    device: torch.device
    seed: int = 0
    clip_norm: float | None = None
    skip_nonfinite: bool = False
    post_validation: bool = False
    learning_rate_factor: Callable[[int], float] | None = None
    clock: Callable[[], float] = now_s

    @property
    def rule(self) -> StepRule:
        """When and how far a step is taken."""
        return StepRule(self.clip_norm, self.skip_nonfinite)


class Worker:
    """Runs iterations of one rank.

    Parameters
    ----------
    plan, schedule : the plan and its schedule, lowered to sends, receives, reductions and optimizer steps.
    chain : the whole model; what this rank does not hold is dropped from it.
    store : where ranks publish shapes.
    groups : process groups to use and add to, so that several workers in turn share them.
    at_action : told the position of each action in the rank's list before it runs.
    """

    def __init__(
        self,
        plan: Plan,
        schedule: Schedule,
        chain: LayerChain,
        settings: WorkerSettings,
        *,
        store: dist.Store,
        groups: Groups | None = None,
        at_action: Callable[[int], None] = lambda position: None,
    ) -> None:
        self.plan = plan
        self.chain = chain
        self.topology = Topology(plan, dist.get_rank())
        self.settings = settings
        self.recorder = Recorder(clock=settings.clock)
        self.steps = tuple(schedule.actions(self.topology.pipeline_rank))
        self.groups = groups or Groups()
        self._owns_groups = groups is None
        self._division = None if _is_dynamic(plan) else division_of(plan, schedule)
        self._at_action = at_action
        self._policy = schedule.weight_policy
        self._schedule = schedule
        self._factor: float | None = 1.0
        self._is_scaled = False
        self.gradient_norm: float | None = None
        self._optimizers: dict[StageKey, torch.optim.Optimizer] = {}
        self._updates: dict[StageKey, int] = {}  # finished, since the optimizers are in use
        self._updating = threading.Lock()
        self._traffic: dict[str, float] = {}
        views = [Topology(plan, rank) for rank in range(dist.get_world_size())]
        splits_backward = any(action.kind is Kind.I for action in self.actions)
        self._layers = RankLayers(
            plan,
            self.topology,
            chain,
            self.groups,
            settings.device,
            self._traffic,
            views=views,
            splits_backward=splits_backward,
        )
        self.stages = self._layers.stages(self.actions)
        self._outer_step = outer_step_of(plan)
        self._local_steps: LocalSteps | None = None
        self._outer_group = self.groups.make_all("outer", {view.replica_ranks for view in views})
        maker = BucketMaker(
            plan,
            schedule,
            self.topology,
            chain,
            layers=self._layers,
            stages=self.stages,
            parameters=self.parameters(),
            groups=self.groups,
            traffic=self._traffic,
            views=views,
        )
        buckets = maker.make()
        self.windows = maker.windows()
        self.buckets = BucketSet(buckets, self.windows)
        self.transport = PointToPoint(self.groups, settings.device, len(plan.stages))
        self._mailbox = Mailbox(self._graph(), self.transport, ShapeBook(store), self.recorder)
        self._check_reductions()
        self._validation = self._make_validation()
        self._swap = make_swap(schedule, self.topology, self.groups, settings.device)
        self._sent_in_warm_up = self._messages_of_warm_ups(schedule) if settings.post_validation else frozenset()

    @property
    def actions(self) -> tuple[Action, ...]:
        """This rank's actions in order, fused ones apart."""
        return tuple(action for step in self.steps for action in step)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters by their name in the model, tied ones once."""
        result: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for stage in self.stages.values():
            for name, parameter in stage.segment.named_parameters().items():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    result[name] = parameter
        return result

    def use_optimizer(self, choice: OptimizerChoice | None) -> None:
        """Step with this optimizer from now on; with None, iterations only leave gradients."""
        self.settle()
        self._optimizers = {}
        for bucket in self.buckets.buckets:
            self._keep_on_host(bucket, 0)
        self._updates = {self._stepper(key): 0 for key in self.topology.stages}
        self._local_steps = None
        if choice is None:
            return
        if self._validation is not None and choice.name in MATRIX_OPTIMIZERS:
            raise InvalidArgument(
                f"a step of {choice.name} is not taken back: it uses its gradients up",
                field="post_validation",
                hint="take an elementwise optimizer, or no post-validation",
            )
        if self._outer_step is not None and self._outer_group is not None:
            self._local_steps = LocalSteps(self._outer_step, self.buckets.buckets, self._outer_group, self._traffic)
        for key in dict.fromkeys(self._step_order()):
            mine = [value for bucket in self._stepped(key) for value in bucket.optimized()]
            if mine:
                self._optimizers[key] = self._make_optimizer(choice, key)
                for bucket in self._stepped(key):
                    if isinstance(bucket, VersionedBucket):
                        bucket.optimizer = self._optimizers[key]

    def _make_optimizer(self, choice: OptimizerChoice, key: StageKey) -> torch.optim.Optimizer:
        """Return the optimizer of what a stage's OPT steps, with the states on the host that the plan keeps there."""
        parameters: list[tuple[nn.Parameter, int]] = []
        counts: list[tuple[Bucket, int]] = []
        for bucket in self._stepped(key):
            mine = bucket.optimized()
            sizes = [value.numel() for value in mine]
            last = max(stage for _, stage in bucket.holders)
            away = offloaded_elements(self.plan.stages[last].optimizer_offload, sum(sizes))
            parameters += zip(mine, last_elements(sizes, away), strict=True)
            counts.append((bucket, away))
        narrow = any(has_narrow_gradients(parameter) for parameter, _ in parameters)
        if choice.name in MATRIX_OPTIMIZERS or not (narrow or any(away for _, away in counts)):
            return make_optimizer(choice, [parameter for parameter, _ in parameters], self._layouts(choice, key))
        made = PiecewiseOptimizer(partial(make_optimizer, choice), parameters, self._count_copy)
        for bucket, away in counts:
            self._keep_on_host(bucket, away)
        return made

    def _layouts(self, choice: OptimizerChoice, key: StageKey) -> LayoutOf:
        """Return which tensors lie in what the optimizer of a stage's OPT steps."""
        split = self._layers.shards_of(key[1])
        kinds = self._tensor_kinds(split, matrices_only=choice.name == "shampoo")
        whole = whole_layouts(kinds.matrices)
        shards = {
            id(value): bucket.layout(kinds)
            for bucket in self._stepped(key)
            if isinstance(bucket, ShardedBucket)
            for value in bucket.optimized()
        }

        def layout_of(parameter: nn.Parameter) -> Layout:
            if id(parameter) in shards:
                return shards[id(parameter)]
            if id(parameter) in kinds.rows:
                return RowsLayout(parameter, split.dividing(parameter))
            tensor = kinds.split_of(parameter, split)
            return whole(parameter) if tensor is None else SplitLayout(tensor, id(parameter) in kinds.matrices)

        return layout_of

    def _tensor_kinds(self, split: TensorShards, *, matrices_only: bool) -> TensorKinds:
        """Return what an optimizer needs of parameters split so: whole matrices, or any other tensor's size too."""
        matrices, vocabulary = block_matrices(self.chain), vocabulary_parameters(self.chain)
        experts = frozenset(self._layers.experts)
        parameters = list(self.chain.model.parameters())
        parts = frozenset(id(value) for value in parameters if split.is_split(value))
        rows = parts & (vocabulary | (experts - matrices))
        wanted = matrices if matrices_only else parts - rows
        gathered = [id(value) for value in parameters if id(value) in wanted and split.tensor_split(value) is not None]
        return TensorKinds(matrices, {value: number for number, value in enumerate(gathered)}, rows)

    def _keep_on_host(self, bucket: Bucket, num_elements: int) -> None:
        if isinstance(bucket, ShardedBucket):
            bucket.keep_on_host(num_elements, self._count_copy)

    def _count_copy(self, num_bytes: float) -> None:
        self._traffic[HOST_COPY] = self._traffic.get(HOST_COPY, 0.0) + num_bytes

    def host_bytes(self) -> float:
        """Return the bytes of optimizer states that this rank keeps in host memory."""
        masters = [bucket.host_bytes() for bucket in self.buckets.buckets if isinstance(bucket, ShardedBucket)]
        states = [each.host_bytes() for each in self.optimizers if isinstance(each, PiecewiseOptimizer)]
        return sum(masters) + sum(states)

    def gradients(self) -> dict[str, Tensor]:
        """Return the summed gradients of this rank's trainable parameters by name, whole; a collective."""
        self.settle()
        return {name: value for bucket in self.buckets.buckets for name, value in bucket.gradients().items()}

    def weights(self) -> dict[str, Tensor]:
        """Return copies of this rank's trainable parameters by name, whole; a collective."""
        self.settle()
        return {name: value for bucket in self.buckets.buckets for name, value in bucket.values().items()}

    def load_weights(self, values: Mapping[str, Tensor]) -> None:
        """Set this rank's trainable parameters to whole values."""
        self.settle()
        for bucket in self.buckets.buckets:
            bucket.load(values)

    def optimizer_states(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of this rank's optimizer states by key and parameter name, whole; a collective."""
        self.settle()
        result: dict[str, dict[str, Tensor]] = {}
        for bucket, optimizer in self._bucket_optimizers():
            for key, values in bucket.states(optimizer).items():
                result.setdefault(key, {}).update(values)
        return result

    def load_optimizer_states(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set this rank's optimizer states to whole values by key and parameter name."""
        self.settle()
        for bucket, optimizer in self._bucket_optimizers():
            bucket.load_states(optimizer, values)

    def _bucket_optimizers(self) -> list[tuple[Bucket, torch.optim.Optimizer]]:
        """Return each bucket, in one order on all ranks, with the optimizer that steps it."""
        found = {id(bucket): optimizer for key, optimizer in self._optimizers.items() for bucket in self._stepped(key)}
        return [(bucket, found[id(bucket)]) for bucket in self.buckets.buckets if id(bucket) in found]

    def run(self, batch: Batch, step: int) -> float | None:
        """Run one iteration on a global batch; returns this rank's share of the loss when it holds the last layer."""
        steps = self.steps
        if self._division is None:
            steps, iteration = self._dynamic(batch, step)
        else:
            iteration = self.iteration(batch, step)
        interpreter = Interpreter(
            self.stages,
            self._mailbox,
            self.buckets,
            optimize=self._optimize if self._optimizers else None,
            recorder=self.recorder,
            at_action=self._at_action,
            warm_up=self._warm_up(),
            swap=self._swap,
        )
        self.recorder.clear()
        self._factor, self._is_scaled = 1.0, False
        self._set_learning_rates(step)
        interpreter.run(steps, iteration)
        losses = [
            float(loss) * iteration[stage.index, unit].loss_weight
            for stage in self.stages.values()
            for unit, loss in stage.losses.items()
        ]
        for stage in self.stages.values():
            stage.losses.clear()
        if self._local_steps is not None:
            self._local_steps.after_step()
        updates = 1 if self._division is None else self._division.num_updates
        if self._outer_step is not None:  # each replica's loss is a mean of its own
            updates *= self.topology.degrees.dp
        is_first_copy = self.topology.at(len(self.plan.stages) - 1).coordinates.tp == 0
        return sum(losses) / updates if losses and is_first_copy else None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers in use."""
        return list(self._optimizers.values())

    def traffic(self) -> dict[str, float]:
        """Return the bytes this rank has sent so far, by operation and group."""
        return {"send-receive/pp": float(self.transport.bytes_sent), **traffic_of(self._swap), **self._traffic}

    def zero_gradients(self) -> None:
        """Forget all gradients."""
        for bucket in self.buckets.buckets:
            bucket.clear()

    def close(self) -> None:
        """Destroy the process groups that this worker made for itself."""
        if self._owns_groups:
            self.groups.close()

    def iteration(self, batch: Batch, step: int) -> Iteration:
        """Return what this rank's stages run on: their replica's microbatches, whole or in slices of their sequence."""
        if self._division is None:
            return self._dynamic(batch, step)[1]
        expected = samples_over_replicas(self.plan, self._division)
        if batch_size(batch) != expected:
            raise InvalidArgument(
                f"the batch has {batch_size(batch)} samples, the plan takes {len(self._division.sizes)} microbatches over "
                f"{self.plan.stages[0].degrees.dp} replicas with {expected} in all",
                field="data",
            )
        used = {(action.stage, action.microbatch) for action in self.actions if action.kind is Kind.F}
        alike: dict[tuple[tuple[int, ...], int], dict[Unit, UnitInput]] = {}
        found: dict[tuple[int, Unit], UnitInput] = {}
        for stage, index in sorted(used):
            key = (samples_by_replica(self.plan, stage), index)
            if key not in alike:
                alike[key] = self._units(batch, step, stage, index)
            found |= {(stage, unit): given for unit, given in alike[key].items()}
        return found

    def _units(self, batch: Batch, step: int, stage: int, index: int) -> dict[Unit, UnitInput]:
        """Return the units of one microbatch at a stage."""
        assert self._division is not None
        division, topology = self._division, self.topology.at(stage)
        share = replica_weight(self.plan, stage, topology.coordinates.dp)
        part = to_device(self._part(batch, stage, index), self.settings.device)
        seed = microbatch_seed(self.settings.seed, step, topology.coordinates.dp * len(division.sizes) + index)
        weight = division.share(index) * (share if self._outer_step is None else 1)
        if topology.degrees.cp > 1:
            mine = self._layers.positions(topology.coordinates.cp)
            piece = select_sequence(part, self.chain.model, mine, self.plan.job.sequence_length)
            return {(index, -1): UnitInput(piece.batch, piece.loss_weight * weight, seed)}
        if not self._is_sliced:
            return {(index, -1): UnitInput(part, weight, seed)}
        pieces = divide_sequence(part, self.chain.model, self._slice_lengths(part))
        return {
            (index, position): UnitInput(piece.batch, piece.loss_weight * weight, seed)
            for position, piece in enumerate(pieces)
        }

    def _part(self, batch: Batch, stage: int, microbatch: int) -> Batch:
        """Return this rank's samples of a microbatch at a stage.

        Each replica of stage 0 has a piece of the batch, and a microbatch of its own from it; stages with another number of
        replicas divide the microbatches of all those among them.
        """
        assert self._division is not None
        count, place = self.plan.stages[stage].degrees.dp, self.topology.at(stage).coordinates.dp
        if has_uneven_shares(self.plan):
            return replica_part(batch, self.plan, stage, place, microbatch)
        sizes, first = self._division.sizes, self.plan.stages[0].degrees.dp
        start, size, each = sum(sizes[:microbatch]), sizes[microbatch], self._division.samples
        if first == count:
            return slice_batch(batch, place * each + start, size)
        whole = torch.cat([torch.arange(size) + start + replica * each for replica in range(first)])
        return select_samples(batch, whole.chunk(count)[place])

    def _dynamic(self, batch: Batch, step: int) -> tuple[tuple[tuple[Action, ...], ...], Iteration]:
        """Return this rank's steps and units for a batch whose microbatches and order are made for it."""
        made = plan_iteration(self.plan, batch)
        units = {
            (stage, (index, -1)): UnitInput(
                to_device(part, self.settings.device), weight, microbatch_seed(self.settings.seed, step, index)
            )
            for index, (part, weight) in enumerate(zip(made.microbatches, made.weights, strict=True))
            for stage in sorted({stage for _, stage in self.topology.stages})
        }
        return tuple(made.schedule.actions(self.topology.pipeline_rank)), units

    @property
    def _is_sliced(self) -> bool:
        return any(action.slice >= 0 for action in self.actions)

    def _slice_lengths(self, batch: Batch) -> tuple[int, ...]:
        """Return the slices' lengths: the plan's `slice_lengths`, comma-separated, or equal ones."""
        spec = self.plan.schedule
        told = spec.parameters.get("slice_lengths")
        if told is None:
            return equal_lengths(sequence_length(batch), spec.num_slices)
        lengths = tuple(int(text) for text in str(told).split(","))
        if len(lengths) != spec.num_slices or sum(lengths) != sequence_length(batch):
            raise InvalidArgument(
                f"slice_lengths {told} must be {spec.num_slices} lengths with the sum {sequence_length(batch)}",
                field="schedule.parameters.slice_lengths",
            )
        return lengths

    def _warm_up(self) -> WarmUp | None:
        """Return how the next iteration begins when the last step still waits for its validation."""
        if self._validation is None or not self._validation.is_pending:
            return None
        return WarmUp(self._validation.validate, self._sent_in_warm_up)

    def _messages_of_warm_ups(self, schedule: Schedule) -> frozenset[Message]:
        """Return the messages to this rank that others send before their own validation."""
        found: set[Message] = set()
        for rank in range(schedule.num_ranks):
            steps = tuple(schedule.actions(rank))
            for step in steps[: warm_up_length(steps)]:
                for action in step:
                    if action.kind is Kind.SEND_F:
                        found |= self._mailbox.messages_here(action)
        return frozenset(found)

    def _stepped(self, key: StageKey) -> list[Bucket]:
        """Return the buckets that a stage's OPT steps: those whose other holders' OPTs stand before it."""
        order = self._step_order()
        return [
            bucket
            for bucket in self.buckets.of(key)
            if max({self._stepper(holder) for holder in bucket.holders}, key=order.index) == key
        ]

    def _step_order(self) -> list[StageKey]:
        """Return the stages that this rank's OPT actions step, in order."""
        return [self._stepper((action.replica, action.stage)) for action in self.actions if action.kind is Kind.OPT]

    def _stepper(self, key: StageKey) -> StageKey:
        """Return the stage that stands for all those with the same weights on this rank.

        A worker of a PipeDream stage holds it once for each way that minibatches take, and each of its steps is one of all.
        """
        if self._policy is not WeightPolicy.STASH:
            return key
        return min(other for other in self.topology.stages if other[1] == key[1])

    def _set_learning_rates(self, step: int) -> None:
        factor = self.settings.learning_rate_factor
        if factor is not None:
            for optimizer in self._optimizers.values():
                scale_learning_rate(optimizer, factor(step))

    def _scale_once(self) -> None:
        """Scale all gradients before the first optimizer step of the iteration; all ranks meet here."""
        if self._is_scaled or not self.settings.rule.looks_at_norm:
            return
        self._is_scaled = True
        squared = whole_squared_norm(
            self.buckets.squared_norm(), self.plan.mapping.pipeline_ranks, self.settings.device
        )
        self.gradient_norm = squared**0.5
        self._factor = self.settings.rule.factor(squared)
        if self._factor is not None and self._factor != 1.0:
            for bucket in self.buckets.buckets:
                scale_gradients(bucket.optimized(), self._factor)

    def _optimize(self, key: StageKey, microbatch: int) -> None:
        key = self._stepper(key)
        optimizer = self._optimizers.get(key)
        if self._validation is not None:
            if not self._validation.is_pending:
                self._validation.begin(self.buckets.squared_norm())
            if optimizer is not None:
                self._validation.step(optimizer, self._stepped(key))
            return
        self._scale_once()
        with self._updating:
            if optimizer is not None:
                for bucket in self._stepped(key):
                    bucket.before_step(microbatch)
                if self._factor is not None:
                    optimizer.step()
                for bucket in self._stepped(key):
                    bucket.after_step()
                    bucket.clear()
            self._updates[key] += 1

    @contextmanager
    def between_updates(self, timeout_s: float) -> Iterator[dict[int, int] | None]:
        """Hold back the optimizers and yield how many updates each stage has had; None when one does not end in time.

        For another thread than the one that runs the iterations.
        """
        if not self._updating.acquire(timeout=timeout_s):
            yield None
            return
        try:
            yield {stage: count for (_, stage), count in self._updates.items()}
        finally:
            self._updating.release()

    def stage_parameters(self) -> dict[int, list[str]]:
        """Return the names under which the parameters of each stage are saved."""
        first = {name: tie.parameter for tie in self.chain.ties for name in tie.names}
        return {
            stage: [first.get(name, name) for name in self.stages[replica, stage].segment.named_parameters()]
            for replica, stage in self.topology.stages
        }

    @property
    def validation(self) -> PostValidation | None:
        """Counts of amended and taken back steps, under post-validation."""
        return self._validation

    def settle(self) -> None:
        """Validate the last optimizer step, where one waits for it; every rank calls this."""
        if self._validation is not None and self._validation.is_pending:
            self._validation.validate()

    def _make_validation(self) -> PostValidation | None:
        if not self.settings.post_validation:
            return None
        group = self.groups.make("validation", range(dist.get_world_size()))
        beside = self.groups.make_all("pipeline rank", self.plan.mapping.pipeline_ranks)
        zero = max(stage.degrees.zero for stage in self.plan.stages)
        if self._policy is not WeightPolicy.FLUSH or zero == 3:
            raise InvalidArgument(
                f"{self.plan.schedule.name} with zero={zero} cannot take a step back",
                field="post_validation",
                hint="take a synchronous schedule and zero at most 2",
            )
        return PostValidation(self.settings.rule, self.topology, group, beside, self.settings.device)

    def _graph(self) -> StageGraph:
        kinds = [layer.kind for layer in self.chain.layers]
        reshardings = make_reshardings(self.plan, kinds, self.groups, self._traffic)
        return make_stage_graph(self.plan, self.topology, self.chain.edges, kinds, reshardings)

    def _check_reductions(self) -> None:
        reduced = [(a.replica, a.stage) for a in self.actions if a.kind is Kind.REDUCE_GRAD]
        if self._policy is WeightPolicy.STASH:
            reduced = [self._stepper(key) for key in reduced]
        for key in {self._stepper(key) for key in self.topology.stages}:
            if reduced.count(key) != 1:
                raise InvalidSchedule(
                    f"stage {key[1]} of replica {key[0]} has {reduced.count(key)} REDUCE_GRAD actions, it needs 1",
                    hint="lower the schedule with its reductions: without them gradients would not be sums",
                )


def _is_dynamic(plan: Plan) -> bool:
    """Whether each batch has microbatches and an order of its own."""
    if plan.schedule.name != "dynapipe":
        return False
    if plan.stages[0].degrees.dp > 1 or plan.stages[0].degrees.cp > 1:
        raise InvalidArgument(
            f"dynapipe runs with dp = cp = 1, the plan has {plan.stages[0].degrees.dp} and {plan.stages[0].degrees.cp}",
            field="degrees.dp",
        )
    return True
