"""Where one rank stands in a plan: its coordinates, its stages, its peers and its groups.

A pipeline rank is a set of dp x cp x tp devices, listed with tp fastest and dp slowest. Messages of the pipeline go
between devices with equal coordinates; where stages differ in replicas, tensor or context degrees, every device receives the
samples and the parts of the sequence that it works on, of several equal copies from one. Gradients of a stage are summed over its
data- and context-parallel devices in every model replica of the pipeline, apart for each tensor-parallel coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.link_bytes import sharding_group
from stagewright.planner.replica_shares import has_uneven_shares, samples_by_replica
from stagewright.runtime.sequence_pieces import context_layout, num_pieces, pieces_held

StageKey = tuple[int, int]  # (replica, stage)


@dataclass(frozen=True)
class Coordinates:
    """Position of a device within its pipeline rank."""

    tp: int
    cp: int
    dp: int


@dataclass(frozen=True)
class Part:
    """The samples of a rank's microbatch, `first` to `first + count` - 1, that it exchanges with another rank.

    Of the `held` equal pieces of a sequence that the rank itself has, `pieces` travel, in this order.
    """

    rank: int
    first: int
    count: int
    pieces: tuple[int, ...] = (0,)
    held: int = 1


@dataclass(frozen=True)
class Topology:
    """One rank's view of a plan's mapping.

    Parameters
    ----------
    stage : in whose degrees coordinates are given, where the rank's stages differ; the first of them unless told.
    """

    plan: Plan
    rank: int
    stage: int | None = None

    def at(self, stage: int) -> Topology:
        """Return the view in the degrees of one stage."""
        return Topology(self.plan, self.rank, stage)

    @cached_property
    def _place(self) -> tuple[int, int]:
        for pipeline_rank, ranks in enumerate(self.plan.mapping.pipeline_ranks):
            if self.rank in ranks:
                return pipeline_rank, ranks.index(self.rank)
        raise InvalidDocument(
            f"rank {self.rank} has no place in the plan, which is for {self.plan.num_devices} ranks", field="mapping"
        )

    @property
    def pipeline_rank(self) -> int:
        """Which pipeline rank this device belongs to."""
        return self._place[0]

    @cached_property
    def stages(self) -> tuple[StageKey, ...]:
        """(replica, stage) of every virtual stage on this rank."""
        placement = self.plan.schedule.placement
        return tuple(
            (replica, stage)
            for replica, row in enumerate(placement)
            for stage, holder in enumerate(row)
            if holder == self.pipeline_rank
        )

    @property
    def _own(self) -> int:
        return self.stages[0][1] if self.stage is None else self.stage

    @cached_property
    def degrees(self) -> Degrees:
        """Degrees of the stage."""
        return self.plan.stages[self._own].degrees

    @cached_property
    def coordinates(self) -> Coordinates:
        """This device's position in its pipeline rank."""
        return coordinates_of(self._place[1], self.degrees)

    @property
    def tensor_ranks(self) -> tuple[int, ...]:
        """Global ranks that split this rank's tensors with it."""
        ranks = self.plan.mapping.pipeline_ranks[self.pipeline_rank]
        first = self._place[1] - self.coordinates.tp
        return tuple(ranks[first : first + self.degrees.tp])

    def key_value_ranks(self, copies: int) -> tuple[int, ...]:
        """Return those of `tensor_ranks` that hold the same key-value head as this rank: `copies` neighbours."""
        first = self.coordinates.tp // copies * copies
        return self.tensor_ranks[first : first + copies]

    @property
    def context_ranks(self) -> tuple[int, ...]:
        """Global ranks that divide this rank's sequences with it, in the order of their parts."""
        ranks = self.plan.mapping.pipeline_ranks[self.pipeline_rank]
        first = self._place[1] - self.coordinates.cp * self.degrees.tp
        return tuple(ranks[first + part * self.degrees.tp] for part in range(self.degrees.cp))

    @property
    def replica_ranks(self) -> tuple[int, ...]:
        """Global ranks with this one's coordinates in all data-parallel replicas."""
        ranks = self.plan.mapping.pipeline_ranks[self.pipeline_rank]
        size = self.degrees.tp * self.degrees.cp
        return tuple(ranks[self._place[1] % size :: size])

    @property
    def ulysses_ranks(self) -> tuple[int, ...]:
        """Those of `context_ranks` that exchange heads with this rank: neighbours."""
        size = self.degrees.ulysses
        first = self.coordinates.cp // size * size
        return self.context_ranks[first : first + size]

    @property
    def ring_ranks(self) -> tuple[int, ...]:
        """Those of `context_ranks` that form this rank's ring."""
        size = self.degrees.ulysses
        return self.context_ranks[self.coordinates.cp % size :: size]

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        """Global ranks that divide this rank's experts with it: across all axes of the pipeline rank, every etp-th device."""
        ranks, etp = self.plan.mapping.pipeline_ranks[self.pipeline_rank], self.degrees.etp
        size = etp * self.degrees.ep
        first = self._place[1] // size * size + self._place[1] % etp
        return tuple(ranks[first : first + size : etp])

    @property
    def expert_tensor_ranks(self) -> tuple[int, ...]:
        """Global ranks that split the tensors of this rank's experts with it: neighbours in the pipeline rank."""
        ranks, etp = self.plan.mapping.pipeline_ranks[self.pipeline_rank], self.degrees.etp
        first = self._place[1] // etp * etp
        return tuple(ranks[first : first + etp])

    def expert_gradient_ranks(self, stage: int) -> tuple[int, ...]:
        """Return the global ranks that own the same experts of a stage as this rank."""
        size = self.degrees.expert_split
        holders = {row[stage] for row in self.plan.schedule.placement}
        return tuple(
            sorted(
                rank
                for holder in holders
                for index, rank in enumerate(self.plan.mapping.pipeline_ranks[holder])
                if index % size == self._place[1] % size
            )
        )

    def expert_shard_ranks(self, stage: int) -> tuple[int, ...]:
        """Return those of `expert_gradient_ranks` that divide the states under ZeRO: this rank's own pipeline rank.

        The devices of another model replica come by at other times, so they only sum what is left of an iteration.
        """
        return tuple(rank for rank in self.expert_gradient_ranks(stage) if self.is_beside(rank))

    def expert_shard_owners(self, stage: int) -> tuple[int, ...]:
        """Return the ranks that own the same share of the states of a stage's experts, in every model replica."""
        place = self.expert_shard_ranks(stage).index(self.rank)
        views = [Topology(self.plan, rank) for rank in self.expert_gradient_ranks(stage)]
        return tuple(sorted({view.expert_shard_ranks(stage)[place] for view in views}))

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one iteration and data-parallel replica."""
        return self.plan.schedule.num_microbatches

    def holder(self, replica: int, stage: int) -> int:
        """Return the global rank that this rank exchanges a stage's messages with."""
        pipeline_rank = self.plan.schedule.placement[replica][stage]
        if pipeline_rank == self.pipeline_rank:
            return self.rank
        return self.plan.mapping.pipeline_ranks[pipeline_rank][self._place[1]]

    def parts(self, replica: int, stage: int, *, is_split: bool = False) -> tuple[Part, ...]:
        """Return from whom this rank receives a stage's messages, and which samples of its microbatch, in their order.

        A microbatch of all replicas lies over the replicas of a stage in one piece each: where two stages have as many,
        devices at one place exchange all they have, else each exchanges with those whose samples are its own (DAPPLE's
        split and concatenation). The same holds for sequences, by those that divide them over context-parallel devices and,
        where sequence parallelism `is_split` between the two stages, over tensor-parallel ones. Of devices that hold equal
        copies, one sends.
        """
        return self._exchanged(replica, stage, is_split, receives=True)

    def takers(self, replica: int, stage: int, *, is_split: bool = False) -> tuple[Part, ...]:
        """Return to whom this rank sends a stage's messages; none where another sends an equal copy of what it holds."""
        return self._exchanged(replica, stage, is_split, receives=False)

    def _exchanged(self, replica: int, stage: int, is_split: bool, *, receives: bool) -> tuple[Part, ...]:
        own = samples_by_replica(self.plan, self._own)
        theirs = samples_by_replica(self.plan, stage)
        mine, degrees = self.num_samples, self.plan.stages[stage].degrees
        is_here = self.plan.schedule.placement[replica][stage] == self.pipeline_rank
        if is_here or (own == theirs and _divided(degrees) == _divided(self.degrees)):
            return (Part(self.holder(replica, stage), 0, mine),)
        found = []
        for place, first, count in self._shared_samples(own, theirs):
            for rank, other in self._devices_of_replica(replica, stage, place):
                sender, taker = ((other, degrees), (self.coordinates, self.degrees))[:: 1 if receives else -1]
                if _sends(*sender, taker[0].tp, is_split):
                    pieces, held = self._shared_pieces(degrees, other, is_split)
                    found += [Part(rank, first, count, pieces, held)] if pieces else []
        return tuple(found)

    def _shared_samples(self, own: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int, int]]:
        """Return with which replicas of another stage this rank shares samples, the first of its own ones, and how many."""
        begin, start, found = sum(own[: self.coordinates.dp]), 0, []
        for replica, share in enumerate(theirs):
            first, end = max(begin, start), min(begin + self.num_samples, start + share)
            if first < end:
                found.append((replica, first - begin, end - first))
            start += share
        return found

    def _devices_of_replica(self, replica: int, stage: int, place: int) -> list[tuple[int, Coordinates]]:
        """Return the devices of a data-parallel replica of a stage, with their positions."""
        degrees = self.plan.stages[stage].degrees
        ranks = self.plan.mapping.pipeline_ranks[self.plan.schedule.placement[replica][stage]]
        size = degrees.tp * degrees.cp
        return [(ranks[index], coordinates_of(index, degrees)) for index in range(place * size, (place + 1) * size)]

    def _shared_pieces(self, degrees: Degrees, other: Coordinates, is_split: bool) -> tuple[tuple[int, ...], int]:
        """Return which of this rank's pieces of a sequence another device has too, and how many it has."""
        total, layout = num_pieces(self.plan), context_layout(self.plan)
        place = self.coordinates
        held = pieces_held(self.degrees, place.cp, place.tp, total, layout, is_split=is_split)
        there = set(pieces_held(degrees, other.cp, other.tp, total, layout, is_split=is_split))
        return tuple(index for index, piece in enumerate(held) if piece in there), len(held)

    @property
    def num_samples(self) -> int:
        """Samples of a microbatch on this rank."""
        return samples_by_replica(self.plan, self._own)[self.coordinates.dp]

    def gradient_ranks(self, stage: int) -> tuple[int, ...]:
        """Return the global ranks that sum a stage's gradients with this one: they hold the same shard of its parameters.

        Replicas with local steps sum nothing in a step, so that only the context-parallel ranks of this one are left.
        """
        alone = "local_steps" in self.plan.schedule.parameters
        ranks: list[int] = []
        own = self.at(stage).coordinates
        for row in self.plan.schedule.placement:
            members = self.plan.mapping.pipeline_ranks[row[stage]]
            degrees = self.plan.stages[stage].degrees
            places = [coordinates_of(index, degrees) for index in range(len(members))]
            ranks += [
                rank
                for rank, place in zip(members, places, strict=True)
                if place.tp == own.tp and (place.dp == own.dp or not alone)
            ]
        return tuple(sorted(set(ranks)))

    def shard_ranks(self, stage: int) -> tuple[int, ...]:
        """Return the ranks that divide a stage's states under ZeRO: a part of the gradient ranks beside this one."""
        beside = [rank for rank in self.gradient_ranks(stage) if self.is_beside(rank)]
        size = shard_size(self.plan, len(beside))
        first = beside.index(self.rank) // size * size
        return tuple(beside[first : first + size])

    def shard_owners(self, stage: int) -> tuple[int, ...]:
        """Return the ranks that own the same share of a stage's states, in every shard group and model replica."""
        place = self.shard_ranks(stage).index(self.rank)
        views = [Topology(self.plan, rank) for rank in self.gradient_ranks(stage)]
        return tuple(view.rank for view in views if view.shard_ranks(stage).index(view.rank) == place)

    def is_beside(self, rank: int) -> bool:
        """Whether another rank is a device of the same pipeline rank."""
        return rank in self.plan.mapping.pipeline_ranks[self.pipeline_rank]


def shard_size(plan: Plan, members: int) -> int:
    """Return over how many of `members` ranks ZeRO divides states: the plan's `shard_size`, or all of them."""
    size = sharding_group(plan) or members
    if members % size:
        raise InvalidDocument(
            f"shard_size {size} does not divide dp * cp = {members}",
            field="schedule.parameters.shard_size",
            hint="take a divisor",
        )
    return size


def has_unequal_replicas(plan: Plan) -> bool:
    """Whether stages differ in how many replicas they have, or in the samples that each of them takes."""
    if len({stage.degrees.dp for stage in plan.stages}) > 1:
        return True
    return has_uneven_shares(plan) and any(
        samples_by_replica(plan, index) != samples_by_replica(plan, 0) for index in range(len(plan.stages))
    )


def has_unequal_tensors(plan: Plan) -> bool:
    """Whether stages differ in how tensor and context parallelism divide what travels between them."""
    return len({_divided(stage.degrees) for stage in plan.stages}) > 1


def _divided(degrees: Degrees) -> tuple[int, bool, int]:
    return degrees.tp, degrees.sp, degrees.cp


def _sends(place: Coordinates, degrees: Degrees, taker: int, is_split: bool) -> bool:
    """Whether a device sends to one at `taker` of a tensor-parallel group: the owner of a part, or one of those with equal copies."""
    return (is_split and degrees.sp) or taker % degrees.tp == place.tp


def coordinates_of(index: int, degrees: Degrees) -> Coordinates:
    """Return the coordinates of device `index` of a pipeline rank."""
    return Coordinates(index % degrees.tp, index // degrees.tp % degrees.cp, index // (degrees.tp * degrees.cp))


def stage_edges(plan: Plan, layer_edges: tuple[tuple[int, int], ...]) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return for each pair of stages the layers of the first whose values the second needs.

    Raises InvalidDocument when two stages need an edge that the plan's schedule does not have.
    """
    stage_of = plan.stage_of_layer
    found: dict[tuple[int, int], set[int]] = {}
    for source, target in layer_edges:
        if stage_of[source] != stage_of[target]:
            found.setdefault((stage_of[source], stage_of[target]), set()).add(source)
    count = len(plan.stages)
    declared = set(plan.schedule.edges) or {(stage, stage + 1) for stage in range(count - 1)}
    missing = sorted(set(found) - declared)
    if missing:
        raise InvalidDocument(
            f"stage {missing[0][1]} needs values of stage {missing[0][0]}, and schedule.edges has no such edge",
            field="schedule.edges",
            hint="plan again with a profile that declares the model's edges",
        )
    return {edge: tuple(sorted(layers)) for edge, layers in sorted(found.items())}
