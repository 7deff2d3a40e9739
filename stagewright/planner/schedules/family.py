"""A schedule family: a named generator with its properties, and the request it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy


@dataclass(frozen=True, eq=False)
class ScheduleRequest:
    """What a generator may look at.

    Parameters
    ----------
    num_ranks, num_microbatches : D and T of the literature.
    num_chunks : virtual stages on each rank (v); the family's default when None.
    num_slices : sequence slices of a microbatch (K).
    num_waves : waves of `wave` (W); v = 2 W.
    costs : seconds and activations of the virtual stages in model order; equal unit stages when None.
    latency_s : one hop between two ranks.
    memory_cap : most live activations of a rank, in rank-microbatches, freed at W; None for no cap.
    placement : rank of each virtual stage, [num_replicas, num_stages], where the family takes any.
    edges : stage graph for families that run DAGs; a chain when empty.
    """

    num_ranks: int
    num_microbatches: int
    num_chunks: int | None = None
    num_slices: int = 1
    num_waves: int | None = None
    costs: StageCosts | None = None
    latency_s: float = 0.0
    memory_cap: float | None = None
    placement: npt.NDArray[np.int32] | None = None
    edges: tuple[tuple[int, int], ...] = ()
    parameters: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleFamily:
    """One row of the registry.

    Parameters
    ----------
    name, aliases : what users type.
    paper : authors, title, venue.
    generate : the pure generator.
    synchronous : one weight version, flush at the end of an iteration.
    split_backward : I and W are scheduled apart.
    num_replicas : model replicas that the placement holds.
    default_chunks : virtual stages on a rank unless told.
    weight_policy : how weights change under the microbatches.
    constraint : the rule on D, T, v, K in words, with the reason; empty when any sizes do.
    improves : the constructed order is improved for the costs, within `parameters["effort"]`, which takes most of its time.
    held_chunks : most live chunks of a rank, from D, whatever the costs, where the construction fixes it.
    fixed_order : sizes alone fix each rank's order of F and I; costs and effort only place the W.
    takes_cap : the order is made for the request's memory cap; other families look away from it.
    plain : F, B, I and W of a chain of stages, and nothing beside them; not where host memory, a peer's memory, another stage graph, or the
        user's own text makes the order one of another problem.
    not_run : why the runtime does not execute it, in words; empty where it does.
    expanded_costs : the costs of its own stages from those of one block on each rank, where it has other stages.
    """

    name: str
    paper: str
    generate: Callable[[ScheduleRequest], Schedule]
    aliases: tuple[str, ...] = ()
    synchronous: bool = True
    split_backward: bool = False
    num_replicas: int = 1
    default_chunks: int = 1
    weight_policy: WeightPolicy = WeightPolicy.FLUSH
    constraint: str = ""
    improves: bool = False
    held_chunks: Callable[[int], int] | None = None
    fixed_order: bool = False
    takes_cap: bool = False
    plain: bool = True
    not_run: str = ""
    expanded_costs: Callable[[StageCosts], StageCosts] | None = None
