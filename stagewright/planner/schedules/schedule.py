"""A schedule: for each rank, the ordered list of its actions.

The one intermediate representation of the product: generators make it, passes lower it, the validator accepts it, the
simulator times it and the runtime interprets it. Orders are held as int32 arrays, because a real schedule has millions
of actions; `Action` objects are made on demand, for printing and for the runtime.

Columns of an order array, shape [num_actions, 6]: KIND, REPLICA, STAGE, MICROBATCH, SLICE, FUSED. A row with FUSED = 1
is executed together with the row after it, as one overlapped action.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Action, Kind

KIND, REPLICA, STAGE, MICROBATCH, SLICE, FUSED = range(6)

Orders = npt.NDArray[np.int32]


class WeightPolicy(StrEnum):
    """Which weights a forward and its backward see, and when gradients are applied."""

    FLUSH = "flush"  # synchronous: one version, updated after all microbatches
    STASH = "stash"  # PipeDream: backward uses the version of its forward
    DOUBLE_BUFFER = "2bw"  # PipeDream-2BW: two versions, delay one
    TWO_GROUP = "2gw"  # WPipe: two groups updated alternately
    NONE = "none"  # AMPNet: whatever is current
    PREDICT = "predict"  # SpecTrain, XPipe, PipeMare: predicted weights
    ELASTIC = "elastic"  # AvgPipe: replicas drawn to a centre


@dataclass(frozen=True, eq=False)
class Schedule:
    """Orders of all ranks with the placement they assume.

    Parameters
    ----------
    name : registry name of the family that made it, or "custom".
    num_microbatches : microbatches in one iteration, over all replicas.
    placement : int32 [num_replicas, num_stages], the rank that holds each virtual stage of each replica.
    orders : one int32 array [num_actions, 6] for each rank.
    num_slices : sequence slices of each microbatch.
    edges : stage graph as (from, to) pairs; a chain unless told.
    weight_policy : when weights change under the microbatches.
    parameters : what the generator was told beyond sizes, for printing and for plans.
    """

    name: str
    num_microbatches: int
    placement: npt.NDArray[np.int32]
    orders: tuple[Orders, ...]
    num_slices: int = 1
    edges: tuple[tuple[int, int], ...] = ()
    weight_policy: WeightPolicy = WeightPolicy.FLUSH
    parameters: Mapping[str, int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.edges:
            object.__setattr__(self, "edges", chain_edges(self.num_stages))

    @property
    def num_ranks(self) -> int:
        return len(self.orders)

    @property
    def num_stages(self) -> int:
        return int(self.placement.shape[1])

    @property
    def num_replicas(self) -> int:
        return int(self.placement.shape[0])

    @property
    def num_chunks(self) -> int:
        """Most virtual stages, over all replicas, that one rank holds."""
        return int(np.bincount(self.placement.ravel(), minlength=self.num_ranks).max())

    @property
    def num_actions(self) -> int:
        return sum(len(order) for order in self.orders)

    @property
    def is_synchronous(self) -> bool:
        return self.weight_policy is WeightPolicy.FLUSH

    def actions(self, rank: int) -> Iterator[tuple[Action, ...]]:
        """Yield the rank's steps in order: one action each, or two for a fused pair."""
        pending: tuple[Action, ...] = ()
        for row in self.orders[rank].tolist():
            step = (*pending, decode(row))
            if row[FUSED]:
                pending = step
            else:
                pending = ()
                yield step

    def text(self, rank: int) -> list[str]:
        """Return the rank's steps in the grammar of `action`."""
        return [step_text(step) for step in self.actions(rank)]


def chain_edges(num_stages: int) -> tuple[tuple[int, int], ...]:
    """Return the edges of a chain of `num_stages` stages."""
    return tuple((stage, stage + 1) for stage in range(num_stages - 1))


def loop_placement(num_ranks: int, num_chunks: int = 1) -> npt.NDArray[np.int32]:
    """Return the placement of one replica where stage s is on rank s mod D, shape [1, D * v]."""
    return (np.arange(num_ranks * num_chunks, dtype=np.int32) % num_ranks)[None, :]


def wave_placement(num_ranks: int, num_chunks: int = 2) -> npt.NDArray[np.int32]:
    """Return the placement that turns around at each end (V for two chunks), shape [1, D * v]."""
    stage = np.arange(num_ranks * num_chunks, dtype=np.int32)
    chunk, position = stage // num_ranks, stage % num_ranks
    return np.where(chunk % 2 == 0, position, num_ranks - 1 - position).astype(np.int32)[None, :]


def decode(row: Sequence[int]) -> Action:
    """Return the action of one row of an order array."""
    return Action(Kind(row[KIND]), row[STAGE], row[MICROBATCH], row[SLICE], row[REPLICA])


def encode(actions: Iterable[Action | tuple[Action, ...]]) -> Orders:
    """Return the order array of a rank's steps; a tuple of actions is one fused step."""
    rows: list[tuple[int, int, int, int, int, int]] = []
    for step in actions:
        parts = step if isinstance(step, tuple) else (step,)
        for index, action in enumerate(parts):
            fused = int(index + 1 < len(parts))
            rows.append((int(action.kind), action.replica, action.stage, action.microbatch, action.slice, fused))
    return np.array(rows, dtype=np.int32).reshape(-1, 6)


def step_text(step: tuple[Action, ...]) -> str:
    """Return the text of one step, in torch's bracket form when it is fused."""
    if len(step) == 1:
        return str(step[0])
    return "(" + ";".join(str(action) for action in step) + ")OVERLAP_F_B"
