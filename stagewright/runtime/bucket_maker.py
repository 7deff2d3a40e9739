"""Which parameters of a rank are reduced together, over which ranks, and who keeps what of their states.

One bucket a stage, one for each set of stages that share parameters, and one for a stage's divided experts; under ZeRO-2
and 3 one for each layer, and one for each layer's divided experts; with weights that change under way each stage has versions of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import nn

from stagewright.modeling.block_matrices import block_matrices
from stagewright.modeling.chain import LayerChain
from stagewright.modeling.tensor_parallel import TensorShards
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.link_bytes import divides_by_tiles, gathers_by_run
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy
from stagewright.runtime.gathering import GatherWindow
from stagewright.runtime.gradient_buffer import BUCKET_BYTES
from stagewright.runtime.groups import Groups
from stagewright.runtime.predicted_weights import predictor_of
from stagewright.runtime.rank_layers import RankLayers
from stagewright.runtime.reduction import Bucket, Purpose, ReplicatedBucket
from stagewright.runtime.sharding import Scattering, ShardedBucket
from stagewright.runtime.stage import Stage
from stagewright.runtime.topology import StageKey, Topology
from stagewright.runtime.weight_versions import DELAYED, VersionedBucket, VersionRule


class BucketMaker:
    """Makes the buckets of one rank; all ranks make the same groups in the same order.

    Parameters
    ----------
    layers, stages, parameters : what this rank holds; parameters by name, tied ones once.
    groups : process groups to use and add to.
    traffic : bytes sent, by collective and axis; the buckets add to it.
    views : the topology as each rank of the world sees it.
    """

    def __init__(
        self,
        plan: Plan,
        schedule: Schedule,
        topology: Topology,
        chain: LayerChain,
        *,
        layers: RankLayers,
        stages: Mapping[StageKey, Stage],
        parameters: Mapping[str, nn.Parameter],
        groups: Groups,
        traffic: dict[str, float],
        views: Sequence[Topology],
    ) -> None:
        self._plan = plan
        self._schedule = schedule
        self._policy = schedule.weight_policy
        self._topology = topology
        self._chain = chain
        self._layers = layers
        self._stages = stages
        self._parameters = parameters
        self._groups = groups
        self._traffic = traffic
        self._views = views
        self._scattering = Scattering()
        self._windowed: dict[StageKey, list[tuple[int, ShardedBucket]]] = {}  # by stage: buckets with their layers

    def windows(self) -> dict[StageKey, GatherWindow]:
        """Return what gathers weights layer by layer, of each stage that does; after `make`."""
        return {key: self._window(layers) for key, layers in self._windowed.items()}

    def make(self) -> list[Bucket]:
        """One bucket a stage, and one for each set of stages that share parameters; all ranks make the same groups."""
        users: dict[str, frozenset[int]] = {}
        stage_of = self._plan.stage_of_layer
        position = {name: index for index, name in enumerate(self._chain.layer_names)}
        for tie in self._chain.ties:
            users.update(dict.fromkeys(tie.names, frozenset(stage_of[position[layer]] for layer in tie.layers)))
        sets = {frozenset((stage,)) for stage in range(len(self._plan.stages))} | set(users.values())
        buckets: list[Bucket] = []
        for shared in sorted(sets, key=sorted):
            group = self._gradient_group(shared)
            if len(shared) == 1:
                self._sharding_groups(min(shared))
            holders = frozenset(key for key in self._topology.stages if key[1] in shared)
            parameters = {
                name: value
                for name, value in self._parameters.items()
                if any(name in self._stages[key].segment.named_parameters() for key in holders)
                and (shared == users[name] if name in users else len(shared) == 1)
            }
            experts = {name: value for name, value in parameters.items() if id(value) in self._layers.experts}
            for name in experts:
                del parameters[name]
            if any(value.requires_grad for value in parameters.values()):
                buckets += self._buckets_of(parameters, group, holders, shared)
            owners = self._expert_gradient_group(min(shared))
            sharding = self._expert_sharding_groups(min(shared))
            if experts:
                buckets += self._expert_buckets(experts, owners, holders, min(shared), sharding)
        return buckets

    def _expert_gradient_group(self, stage: int) -> dist.ProcessGroup | None:
        """Make the groups of ranks that own the same experts of a stage; returns this rank's."""
        degrees = self._plan.stages[stage].degrees
        if degrees.expert_split == 1:
            return None
        sets = []
        for view in self._views:
            if any(other == stage for _, other in view.stages):
                sets.append(view.expert_gradient_ranks(stage))
        return self._groups.make_all(f"experts {stage}", sets)

    def _expert_sharding_groups(self, stage: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """Make the groups of `_sharding_groups` among those that own the same experts; returns this rank's."""
        degrees = self._plan.stages[stage].degrees
        if degrees.expert_split == 1 or degrees.zero == 0:
            return None, None
        views = [view for view in self._views if any(other == stage for _, other in view.stages)]
        inside = {view.expert_shard_ranks(stage) for view in views}
        across = {view.expert_shard_owners(stage) for view in views}
        made = self._groups.make_all(f"expert shards {stage}", inside)
        return made, self._groups.make_all(f"expert replicas {stage}", across)

    def _expert_buckets(
        self,
        experts: dict[str, nn.Parameter],
        owners: dist.ProcessGroup | None,
        holders: frozenset[StageKey],
        stage: int,
        sharding: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None],
    ) -> list[Bucket]:
        """Return the buckets of a stage's divided experts: one, or under ZeRO-2 and 3 one for each layer."""
        zero = self._plan.stages[stage].degrees.zero
        by_layer = zero >= 2 and owners is not None
        layers = self._by_layer(experts, stage, ()) if by_layer else {0: experts}
        made = {
            index: self._synchronous_bucket("edp", values, owners, holders, zero, sharding)
            for index, values in sorted(layers.items())
        }
        if by_layer:
            self._note_windowed(made, holders, zero)
        return list(made.values())

    def _by_layer(
        self, parameters: Mapping[str, nn.Parameter], stage: int, tied: Sequence[str]
    ) -> dict[int, dict[str, nn.Parameter]]:
        """Return the trained parameters of each layer of a stage, and by negative numbers each of those that layers share."""
        layer_of = {
            name: index
            for index in reversed(self._plan.stages[stage].layer_indices)
            for name in self._chain.layers[index].parameters
        }
        layers: dict[int, dict[str, nn.Parameter]] = {}
        for name, value in parameters.items():
            if value.requires_grad:
                layers.setdefault(-1 - tied.index(name) if name in tied else layer_of[name], {})[name] = value
        return layers

    def _note_windowed(self, made: Mapping[int, Bucket], holders: frozenset[StageKey], zero: int) -> None:
        if zero == 3 and not gathers_by_run(self._plan):
            for key in holders:
                self._windowed.setdefault(key, []).extend(
                    (index, bucket) for index, bucket in made.items() if isinstance(bucket, ShardedBucket)
                )

    def _buckets_of(
        self,
        parameters: dict[str, nn.Parameter],
        group: dist.ProcessGroup | None,
        holders: frozenset[StageKey],
        shared: frozenset[int],
    ) -> list[Bucket]:
        """Return a stage's buckets: one, or under ZeRO-2 and 3 one for each layer and each weight that layers share."""
        if self._policy is WeightPolicy.ELASTIC:
            return self._elastic_buckets(parameters, group, holders, shared)
        zero = self._plan.stages[min(shared)].degrees.zero
        if zero < 2 or group is None or len(shared) > 1 or self._policy is not WeightPolicy.FLUSH:
            return [self._make_bucket(parameters, group, holders, shared)]
        tied = [name for tie in self._chain.ties for name in tie.names if name in parameters]
        made: dict[int, Bucket] = {
            index: self._make_bucket(values, group, holders, shared)
            for index, values in sorted(self._by_layer(parameters, min(shared), tied).items())
        }
        self._note_windowed(made, holders, zero)
        return list(made.values())

    def _window(self, placed: Sequence[tuple[int, ShardedBucket]]) -> GatherWindow:
        """Return what gathers a stage layer by layer, given its buckets with the layers they belong to."""
        layers: dict[int, list[ShardedBucket]] = {}
        for index, bucket in placed:
            layers.setdefault(index, []).append(bucket)
        found: list[tuple[list[ShardedBucket], list[nn.Module]]] = []
        for index, buckets in sorted(layers.items()):
            paths = self._chain.layers[index].modules if index >= 0 else ()
            modules = [self._chain.model.get_submodule(path) for path in paths]
            inside = {id(value) for module in modules for value in module.parameters()}
            covered = all(id(value) in inside for bucket in buckets for value in bucket.parameters)
            found.append((buckets, modules if covered else []))
        return GatherWindow(found)

    def _elastic_buckets(
        self,
        parameters: dict[str, nn.Parameter],
        group: dist.ProcessGroup | None,
        holders: frozenset[StageKey],
        shared: frozenset[int],
    ) -> list[Bucket]:
        """Return one bucket for each pipeline: each has weights of its own."""
        made = [self._make_bucket(parameters, group, frozenset((key,)), shared) for key in sorted(holders)]
        together = tuple(bucket for bucket in made if isinstance(bucket, VersionedBucket))
        for bucket in together:
            bucket.siblings = together
        return made

    def _version_rule(self, stage: int) -> VersionRule:
        schedule = self._schedule
        every = int(schedule.parameters.get("update_every", 1))
        first_group = self._policy is WeightPolicy.DOUBLE_BUFFER or stage < schedule.num_stages // 2
        return VersionRule(
            self._policy,
            update_every=schedule.num_microbatches if self._policy is WeightPolicy.ELASTIC else every,
            delay=1 if first_group and self._policy in DELAYED else 0,
            predictor=predictor_of(schedule, stage) if self._policy is WeightPolicy.PREDICT else None,
            elastic_rate=float(schedule.parameters.get("elastic_rate", 0.1)),
        )

    def _make_bucket(
        self,
        parameters: dict[str, nn.Parameter],
        group: dist.ProcessGroup | None,
        holders: frozenset[StageKey],
        shared: frozenset[int],
    ) -> Bucket:
        if self._policy is not WeightPolicy.FLUSH:
            assert len(shared) == 1  # as `support` sees to
            assert group is None or self._policy is WeightPolicy.STASH
            rule = self._version_rule(min(shared))
            return VersionedBucket(self._chain.model, parameters, holders, rule, group=group, traffic=self._traffic)
        zero = self._plan.stages[min(shared)].degrees.zero
        if len(shared) > 1:
            # The ranks of different stages come by at different times, so they can meet only once an iteration.
            return self._synchronous_bucket("tied", parameters, group, holders, min(zero, 1), (group, None))
        return self._synchronous_bucket("dp", parameters, group, holders, zero, self._sharding_groups(min(shared)))

    def _synchronous_bucket(
        self,
        purpose: Purpose,
        parameters: dict[str, nn.Parameter],
        group: dist.ProcessGroup | None,
        holders: frozenset[StageKey],
        zero: int,
        sharding: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None],
    ) -> Bucket:
        """Return the bucket of parameters that the ranks of `group` hold.

        Where ZeRO divides their states, `sharding` has the ranks over which, and those that own the same share elsewhere.
        Weights below 32 bits have masters in fp32, divided or not.
        """
        narrow = any(value.element_size() < 4 for value in parameters.values())
        if (zero == 0 or group is None) and not narrow:
            return self._replicated(purpose, parameters, group, holders)
        if group is None:  # nothing is scattered from one replica, so that gradients can stay where they are summed
            zero = min(zero, 1)
        inside, across = sharding if zero else (None, group)
        return ShardedBucket(
            parameters,
            inside,
            across,
            holders,
            zero,
            self._traffic,
            purpose=purpose,
            everyone=group,
            shards=self._shards_of(holders),
            shares=self._state_shares(holders, inside) if zero and purpose == "dp" else (),
            whole_tiles=block_matrices(self._chain) if divides_by_tiles(self._plan) else (),
            by_layer=not gathers_by_run(self._plan),
            scattering=self._scattering,
        )

    def _shards_of(self, holders: frozenset[StageKey]) -> TensorShards:
        """Return how the parameters of some stages are split: those that share one split it alike."""
        return self._layers.shards_of(min(stage for _, stage in holders))

    def _state_shares(self, holders: frozenset[StageKey], group: dist.ProcessGroup | None) -> tuple[float, ...]:
        """Return which share of a stage's states each rank of the group owns, in its order; none where all own as much."""
        (stage,) = {stage for _, stage in holders}
        told = self._plan.stages[stage].state_shares
        if not told or group is None:
            return ()
        cp = self._plan.stages[stage].degrees.cp  # the devices of a replica own equal parts of its share
        return tuple(
            told[self._views[rank].at(stage).coordinates.dp] / cp for rank in dist.get_process_group_ranks(group)
        )

    def _replicated(
        self,
        purpose: Purpose,
        parameters: dict[str, nn.Parameter],
        group: dist.ProcessGroup | None,
        holders: frozenset[StageKey],
    ) -> ReplicatedBucket:
        """Return an all-reduced bucket; the plan's `all_reduce` is `library` or `ring`, `bucket_bytes` its buckets' size."""
        told = self._plan.schedule.parameters
        algorithm = str(told.get("all_reduce", "library"))
        if algorithm not in ("library", "ring"):
            raise InvalidArgument(
                f"there is no all-reduce {algorithm!r}", field="schedule.parameters.all_reduce", hint="library or ring"
            )
        return ReplicatedBucket(
            f"all-reduce/{purpose}",
            parameters,
            group,
            holders,
            self._traffic,
            self._shards_of(holders),
            always=purpose == "edp",
            overlaps=purpose != "tied" and self._plan.schedule.num_replicas == 1,
            bucket_bytes=int(told.get("bucket_bytes", BUCKET_BYTES)),
            algorithm="ring" if algorithm == "ring" else "library",
        )

    def _gradient_group(self, stages: frozenset[int]) -> dist.ProcessGroup | None:
        """Make the groups of all tensor-parallel coordinates; returns this rank's."""
        sets = []
        for view in self._views:
            if any(stage in stages for _, stage in view.stages):
                sets.append(tuple(sorted({other for stage in stages for other in view.gradient_ranks(stage)})))
        return self._groups.make_all(f"gradients {sorted(stages)}", sets)

    def _sharding_groups(self, stage: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """Return the ranks that divide a stage's states, and those that own the same share in other groups.

        The plan's `shard_size` limits the first (HSDP, MiCS): neighbouring data- and context-parallel ranks.
        """
        inside, across = set(), set()
        for view in self._views:
            if any(other == stage for _, other in view.stages):
                inside.add(view.shard_ranks(stage))
                across.add(view.shard_owners(stage))
        return self._groups.make_all(f"shards {stage}", inside), self._groups.make_all(f"replicas {stage}", across)
